"""The coach of `deploy/configs/paper/coach-8b.yaml`: insights from an answer, for `context.from_rollout`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from typing import Any

ASK = """\
A model answered a user. Judge the answer: what serves the user well, what falls short, what is missing. Then write \
down what the model should know before it answers such a request again, as a short list of general insights, one \
line each, each starting with "- INSIGHT:". Do not write the answer itself.

Request:
{prompt}

Answer:
{response}"""
KNOW = "Insights from earlier attempts at this request:\n{insights}\n\nUse them, and do not mention them."
GENERAL = "You are a helpful assistant."
"""Context of general rows, which have no coach: the teacher's own answer is the aim."""


async def insights(row: Mapping[str, Any], prompt: str, response: str) -> str | None:
    """Ask the coach, a model behind an OpenAI-compatible endpoint (COACH_URL, COACH_MODEL), for insights.

    Rows of the set ``general`` are not coached. None, which leaves the answer out, if the coach writes no insight.
    """
    if str(row.get("id", "")).startswith("general/"):
        return GENERAL
    question = ASK.format(prompt=prompt, response=response)
    body = {"model": os.environ["COACH_MODEL"], "messages": [{"role": "user", "content": question}], "max_tokens": 1024}
    reply = await _client().post("/v1/chat/completions", json=body)
    text = str(reply.raise_for_status().json()["choices"][0]["message"]["content"]).rpartition("</think>")[2]
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith("- INSIGHT:")]
    return KNOW.format(insights="\n".join(lines)) if lines else None


@cache
def _client() -> Any:
    """One client for all calls of a worker."""
    import httpx

    return httpx.AsyncClient(base_url=os.environ["COACH_URL"], timeout=300)
