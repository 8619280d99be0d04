"""Rows that name their teacher."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from common.protocol.schema import ItemScore, Prompt, ScoredTrajectory, Trajectory, as_ids
from common.protocol.scoring import RoutingScorerFactory, ScoringError


@dataclass
class Named:
    name: str
    closed: list[str]

    def __call__(self) -> Named:
        return self

    async def score(self, trajectory: Trajectory) -> ScoredTrajectory:
        nothing = np.zeros(1, np.float32)
        return ScoredTrajectory(trajectory, ItemScore(np.zeros((1, 1), np.float16), nothing, nothing), self.name, 0)

    async def close(self) -> None:
        self.closed.append(self.name)


def answer(teacher: str | None) -> Trajectory:
    ids = as_ids([1])
    prompt = Prompt("row", ids, ids, None, teacher=teacher)
    return Trajectory("s", 0, prompt, ids, np.zeros(1, np.float32), as_ids([[1]]), "stop", ((0, 0),))


async def test_each_row_is_scored_by_the_teacher_it_names() -> None:
    closed: list[str] = []
    scorer = RoutingScorerFactory({"default": Named("default", closed), "big": Named("big", closed)})()
    assert (await scorer.score(answer(None))).model_fingerprint == "default"
    assert (await scorer.score(answer("big"))).model_fingerprint == "big"
    with pytest.raises(ScoringError, match=r"sample s: its row names teacher 'small', the run has big, default"):
        await scorer.score(answer("small"))
    await scorer.close()
    assert sorted(closed) == ["big", "default"]
