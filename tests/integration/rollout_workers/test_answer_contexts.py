"""From a row to the score of its answer under the context that a function makes of it: a worker and a real teacher.

The engine alone is a stand-in; `tests.e2e.test_own_contexts` has the whole run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from common.config.loader import load_config
from common.data.model_lookup import load_tokenizer
from common.data.special_tokens import answer_text
from common.protocol.schema import ScoreItem, as_ids
from learner.data.inputs import read_inputs
from learner.data.samples import SampleSource
from rollout_workers.actor import RolloutWorker
from rollout_workers.engine.engine import Generation
from teacher_server.client import TeacherScorerFactory
from tests.support.teacher_oracle import Oracle, assert_score
from tests.support.teacher_running import KEYS, running

K = 8
SYSTEM = "Judge every attempt by the rules."


class StandInEngine:
    """Answers with fixed tokens, the last one an end of turn."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    async def generate(self, prompt_ids: Any, sampling: Any, request_id: str) -> Generation:
        ids = as_ids([*self._tokenizer(f"{len(prompt_ids)}.", add_special_tokens=False)["input_ids"], 257])
        topk = as_ids(np.tile(np.arange(K), (len(ids), 1)))
        return Generation(ids, np.zeros(len(ids), np.float32), topk, "stop", ((0, 0),))

    def answer_text(self, ids: list[int], stop: tuple[str, ...]) -> str:
        return answer_text(self._tokenizer, ids, {257}, stop)


async def test_the_score_is_that_of_the_function_s_context(tiny_model: Path, tmp_path: Path) -> None:
    rows = [
        {"question": f"What is {name}?", "hint": hint, "answer": "x"}
        for name, hint in (("one", "First"), ("two", "Second"), ("three", "drop"), ("four", "fail"))
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {
        "run": {"name": "small"},
        "student": {"model": str(tiny_model)},
        "context": {"text": SYSTEM, "from_rollout": "tests.support.answer_hooks:by_row", "placement": "user_prefix"},
        "data": {"train": str(tmp_path / "train.jsonl"), "user_template": "{question}"},
        "rollout": {"batch_size": 4, "max_tokens": 8},
        "loss": {"top_k": K},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    config, tokenizer = load_config(tmp_path / "run.yaml"), load_tokenizer(str(tiny_model))
    inputs, oracle = read_inputs(config), Oracle.load(tiny_model)
    source = SampleSource(config, inputs.train)
    with running(tiny_model) as teacher:
        factory = TeacherScorerFactory(
            teacher.url, "run", teacher.info, tuple(inputs.contexts.values()), "at_ids", 1.0, K, 30.0, KEYS["red"]
        )
        worker = RolloutWorker(str(tiny_model), config, factory, max_logprobs=K)
        worker._engine = StandInEngine(tokenizer)  # type: ignore[assignment]
        left: dict[str, str | None] = {}
        for sample in (source[number] for number in range(4)):
            summary, scored = await worker._rollout(sample, "scored", False)
            row = rows[int(sample.prompt.row_id)]
            if scored is None:
                left[row["hint"]] = summary.context.error
                continue
            made = f"{row['hint']}: {row['question']!r} was answered '{len(sample.prompt.student_ids)}.'"
            chat = [{"role": "user", "content": f"{SYSTEM}\n\n{made}\n\n{row['question']}"}]
            prompt = as_ids(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))
            trajectory = scored.trajectory
            expected = oracle.logprobs(as_ids([]), prompt, trajectory.response_ids)
            assert_score(scored.score, expected, ScoreItem(None, prompt, trajectory.response_ids, trajectory.topk_ids))
            assert summary.context.context_id == trajectory.prompt.context_id
            assert trajectory.prompt.own_context.parent in inputs.contexts  # the text for all rows, computed once
        error = f"context.from_rollout {config.context.from_rollout}: KeyError: 'no such\\nthing'"
        assert left == {"drop": None, "fail": error}
        assert len(teacher.service.contexts) == 3
        worker._engine = None
        await worker._close()
