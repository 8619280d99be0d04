"""Which responses of a mix are the teacher's."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from common.config.model import ConfigError
from learner.data.samples import SampleSource, teacher_positions
from tests.support.stub_loop import ROWS, config_of


def mixed(**mix: Any) -> Any:
    return config_of(batch_size=10, samples_per_prompt=2, topk_from="learner", mix=mix)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.33, 1.0])
def test_the_share_is_exact_on_average_and_off_by_less_than_one_in_a_step(share: float) -> None:
    rollout = mixed(teacher=share).rollout
    counts = np.array([len(teacher_positions(step, rollout, seed=3)) for step in range(2000)])
    assert set(counts.tolist()) <= {math.floor(10 * share), math.ceil(10 * share)}
    assert abs(counts.mean() - 10 * share) < 4 * 0.5 / math.sqrt(2000)


def test_every_position_has_its_turn() -> None:
    rollout = mixed(teacher=0.25).rollout
    drawn = np.zeros(10)
    for step in range(2000):
        drawn[list(teacher_positions(step, rollout, seed=3))] += 1
    assert np.abs(drawn / 2000 - 0.25).max() < 4 * math.sqrt(0.25 * 0.75 / 2000)


def test_the_first_steps_are_the_teachers_and_a_prompts_responses_have_one_source() -> None:
    source = SampleSource(mixed(student=0.75, teacher=0.25, teacher_steps=2), ROWS)
    by_step = [[source[20 * step + one] for one in range(20)] for step in range(6)]
    assert [all(sample.from_teacher for sample in step) for step in by_step] == [True, True, *[False] * 4]
    for step in by_step:
        pairs = [(step[2 * one].from_teacher, step[2 * one + 1].from_teacher) for one in range(10)]
        assert all(first == second for first, second in pairs)
    again = SampleSource(mixed(student=0.75, teacher=0.25, teacher_steps=2), ROWS)
    assert again[111].from_teacher == by_step[5][11].from_teacher  # of the number alone, so a resumed run agrees


def test_without_a_mix_all_are_of_one_source() -> None:
    assert not SampleSource(config_of(), ROWS)[7].from_teacher


@pytest.mark.parametrize(
    ("rollout", "loss", "why"),
    [
        ({"mix": {"student": 0.5, "teacher": 0.25}}, {}, r"student \(0\.5\) and teacher \(0\.25\) must add up to 1"),
        ({"topk_from": "engine"}, {}, r"rollout\.mix: no student engine samples the teacher's answers"),
        ({"source": "teacher"}, {}, r"rollout\.mix has responses of both"),
        ({"max_staleness": 1}, {}, "must be 0"),
        ({}, {"importance_clip": 2.0}, "need answers sampled by the student"),
        ({}, {"form": "nll"}, "teaches nothing"),
        ({"samples_per_prompt": 2}, {"reward_weight": 0.5}, "need answers sampled by the student"),
    ],
)
def test_settings_that_do_not_go_with_a_mix_are_refused(
    rollout: dict[str, Any], loss: dict[str, Any], why: str
) -> None:
    from common.config.loader import validate
    from common.config.model import Config

    base = {"run": {"name": "r"}, "student": {"model": "m"}, "context": {"text": "c"}, "data": {"train": "t"}}
    fine = {"topk_from": "learner", "mix": {"teacher": 0.25}}
    validate(Config, {**base, "rollout": fine})
    with pytest.raises(ConfigError, match=why):
        validate(Config, {**base, "rollout": {**fine, **rollout}, "loss": loss})
