"""The learning rate of each update, against transformers' schedules."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import get_scheduler

from common.config.loader import validate
from common.config.model import Config, ConfigError, LearnerConfig
from learner.trainer.optimizer import learning_rate

LR, STEPS, WARMUP = 3e-4, 40, 5


def settings(**keys: object) -> LearnerConfig:
    return LearnerConfig.model_validate({"lr": LR, "steps": STEPS, "warmup_steps": WARMUP, **keys})


def ours(**keys: object) -> list[float]:
    return [learning_rate(update, settings(**keys)) for update in range(STEPS + 3)]


def theirs(name: str, **options: object) -> list[float]:
    """Transformers' schedule. It begins its warm-up at 0, an update that changes nothing: ours begins one later."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    (factor,) = get_scheduler(name, optimizer, WARMUP, STEPS, options or None).lr_lambdas
    return [LR * factor(update + 1 if update < WARMUP else update) for update in range(STEPS + 3)]


@pytest.mark.parametrize(
    ("keys", "oracle"),
    [
        ({}, ("constant_with_warmup", {})),
        ({"lr_schedule": "cosine"}, ("warmup_stable_decay", {"num_decay_steps": STEPS - WARMUP})),
        (
            {"lr_schedule": "cosine", "min_lr": 1e-5},
            ("warmup_stable_decay", {"num_decay_steps": STEPS - WARMUP, "min_lr_ratio": 1e-5 / LR}),
        ),
        ({"lr_schedule": "linear"}, ("linear", {})),
        ({"lr_schedule": "linear", "min_lr": 1e-5}, ("polynomial", {"lr_end": 1e-5, "power": 1.0})),
        (
            {"lr_schedule": "warmup_stable_decay", "decay_steps": 12},
            ("warmup_stable_decay", {"num_decay_steps": 12}),
        ),
        ({"lr_schedule": "warmup_stable_decay"}, ("warmup_stable_decay", {"num_decay_steps": 4})),
    ],
)
def test_schedules_are_those_of_transformers(keys: dict[str, object], oracle: tuple[str, dict[str, object]]) -> None:
    name, options = oracle
    expected = theirs(name, **options)
    if options.get("min_lr_ratio"):  # there their warm-up begins at the minimum
        expected[:WARMUP] = [LR * (update + 1) / WARMUP for update in range(WARMUP)]
    assert ours(**keys) == pytest.approx(expected, rel=1e-12, abs=1e-18)


def test_cosine_is_its_closed_form_and_ends_at_the_minimum() -> None:
    found = ours(lr_schedule="cosine", min_lr=1e-5, warmup_steps=0)
    assert found[0] == LR
    assert found[STEPS // 2] == pytest.approx((LR + 1e-5) / 2)
    assert found[STEPS // 4] == pytest.approx(1e-5 + (LR - 1e-5) * (1 + math.sqrt(0.5)) / 2)
    assert found[STEPS:] == pytest.approx([1e-5] * 3)


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"min_lr": 1e-5}, r"learner\.min_lr is the end of a decay"),
        (
            {"lr_schedule": "cosine", "min_lr": 1e-2},
            r"learner\.min_lr \(0\.01\) is larger than learner\.lr \(0\.0003\)",
        ),
        ({"lr_schedule": "linear", "warmup_steps": STEPS}, "40 steps of warm-up and 1 of decay do not fit"),
        ({"lr_schedule": "warmup_stable_decay", "decay_steps": 36}, "5 steps of warm-up and 36 of decay do not fit"),
        ({"lr_schedule": "cosine", "decay_steps": 4}, r"learner\.decay_steps is for"),
    ],
)
def test_schedules_that_cannot_be_meant_are_refused(keys: dict[str, object], why: str) -> None:
    base = {"run": {"name": "r"}, "student": {"model": "m"}, "context": {"text": "c"}, "data": {"train": "t"}}
    learner = {"lr": LR, "steps": STEPS, "warmup_steps": WARMUP, **keys}
    with pytest.raises(ConfigError, match=why):
        validate(Config, {**base, "learner": learner})
