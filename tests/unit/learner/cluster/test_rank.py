"""A rank's own decisions, without the engine that it passes calls on to."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

import learner.cluster.rank
import learner.trainer.engine
from common.protocol.schema import ScoredTrajectory
from learner.cluster.rank import LearnerRank
from tests.support.scored import learner_config, make_scored


def test_ranks_wait_for_each_other_longer_than_for_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """An export that takes long, or a short limit for lost engines, must not cost the ranks' group."""
    joined: list[tuple[object, ...]] = []
    monkeypatch.setattr(learner.cluster.rank, "join_ranks", lambda *args: joined.append(args))
    monkeypatch.setattr(learner.trainer.engine, "LearnerEngine", lambda config: SimpleNamespace(info=lambda: "info"))
    for keys, limit_s in (({}, 1800.0), ({"collective_timeout_s": 77}, 77.0)):
        config = learner_config(Path("m"), learner=keys, sync={"timeout_s": 30})
        assert LearnerRank(1, 2, config).setup("host", 7) == "info"
        assert joined[-1][:4] == (1, 2, "host", 7)
        assert joined[-1][-1] == limit_s


def test_each_sequence_of_an_item_gets_its_advantage_and_set() -> None:
    """An episode's sequences share the reward of the episode."""
    rank = LearnerRank(0, 1, learner_config(Path("m")))
    taken: list[list[ScoredTrajectory]] = []
    rank._engine = cast(Any, SimpleNamespace(accumulate=taken.append))
    first, second, third, plain = make_scored(4)
    rank.accumulate([(0.5, "train"), (-2.0, "general"), (0.0, "general")], first, [second, third], plain)
    assert [one.advantage for one in taken[0]] == [0.5, -2.0, -2.0, 0.0]
    assert [one.data_set for one in taken[0]] == ["train", "general", "general", "general"]
    assert [one.trajectory.sample_id for one in taken[0]] == [
        one.trajectory.sample_id for one in (first, second, third, plain)
    ]
    rank.accumulate([])
    assert taken[1] == []
