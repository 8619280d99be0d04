"""Contexts made from answers (``context.from_rollout``): two functions that a rollout worker calls for each answer.

    context:
      from_rollout: coach:reference_after_a_mistake
      placement: user_prefix

`opcd train` finds this module in the folder that it starts in. For another folder set PYTHONPATH, on every node.
"""

import os
from collections.abc import Mapping
from functools import cache
from typing import Any

import httpx

from common.evaluation.graders import make_grader

RIGHT = make_grader("contains")


async def reference_after_a_mistake(row: Mapping[str, Any], prompt: str, response: str) -> str | None:
    """Show the teacher the row's solution after a wrong answer; leave right answers out of training."""
    if RIGHT(response, row["answer"]):
        return None
    return f"An earlier attempt answered: {response.strip()}\nThat is wrong. The right answer is: {row['answer']}"


ADVICE = (
    "A student answered a question. Write one short piece of advice that would help the student to answer it better. "
    "Do not give the answer away.\n\nQuestion: {prompt}\n\nAnswer: {response}"
)


async def advice(row: Mapping[str, Any], prompt: str, response: str) -> str | None:
    """Ask a coach, a model behind an OpenAI-compatible endpoint (COACH_URL, COACH_MODEL), for advice on the answer.

    An exception counts as an answer without a score; ``context.max_concurrent_calls`` bounds the calls.
    """
    question = ADVICE.format(prompt=prompt, response=response)
    body = {"model": os.environ["COACH_MODEL"], "messages": [{"role": "user", "content": question}], "max_tokens": 256}
    reply = await client().post("/v1/chat/completions", json=body)
    return str(reply.raise_for_status().json()["choices"][0]["message"]["content"]).strip() or None


@cache
def client() -> httpx.AsyncClient:
    """One client for all calls of this worker."""
    return httpx.AsyncClient(base_url=os.environ["COACH_URL"], timeout=120)
