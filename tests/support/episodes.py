"""A student that plays with fixed answers, and tokens as text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from common.protocol.schema import Ids, as_ids
from rollout_workers.engine.engine import Generation
from tests.support.tiny import make_tokenizer

TOKENIZER = make_tokenizer()


class Student:
    """Gives fixed answers; remembers the prompts. Each answer ends with the stop token unless it is cut short."""

    def __init__(self, answers: Sequence[str], *, stop: bool = True, k: int = 3) -> None:
        self.answers, self.stop, self.k = list(answers), stop, k
        self.prompts: list[list[int]] = []
        self.made: list[Generation] = []

    async def __call__(self, prompt_ids: Ids, turn: int) -> Generation:
        assert turn == len(self.prompts)
        self.prompts.append(prompt_ids.tolist())
        ids = TOKENIZER(self.answers[turn], add_special_tokens=False)["input_ids"]
        ids += [TOKENIZER.eos_token_id] if self.stop else []
        rng = np.random.default_rng(turn)
        self.made.append(
            Generation(
                response_ids=as_ids(ids),
                sampled_logprobs=rng.normal(size=len(ids)).astype(np.float32),
                topk_ids=as_ids(rng.integers(100, 200, (len(ids), self.k))),
                finish_reason="stop" if self.stop else "length",
                versions=((0, turn // 2),) if len(ids) < 2 else ((0, turn // 2), (1, turn // 2 + 1)),
            )
        )
        return self.made[-1]


def text(ids: Ids | Sequence[int]) -> str:
    return str(TOKENIZER.decode(list(map(int, ids))))
