"""The alarm for probability that leaves the support."""

from __future__ import annotations

import math
import random

import torch

from learner.loop.support_alarm import WINDOW, SupportAlarm
from learner.trainer.losses import topk_divergence


def lines(masses: list[float]) -> list[str]:
    alarm = SupportAlarm()
    return [line for line in map(alarm.observe, masses) if line is not None]


def test_a_falling_mass_is_reported_once() -> None:
    (line,) = lines([0.97] * WINDOW + [0.97 - 0.01 * step for step in range(40)])
    assert "fell from 0.970 in the first 5 steps to 0.9" in line
    assert "loss.form `raw`" in line


def test_noise_around_the_first_level_is_not_reported() -> None:
    rng = random.Random(0)
    for outside in (1e-4, 0.003, 0.03, 0.2):
        assert lines([1 - outside * rng.uniform(0.5, 1.5) for _ in range(500)]) == []


def test_a_skipped_step_neither_counts_nor_reports() -> None:
    assert lines([math.nan] * 20 + [0.97] * WINDOW + [math.nan] * 20 + [0.97] * WINDOW) == []


def masses_of_training(form: str) -> list[float]:
    """Mass on a fixed support of 4 ids of 8 while logits are trained towards a teacher that they begin at."""
    teacher = torch.tensor([2.0, 1.5, 1.0, 0.5, -1.0, -1.0, -1.5, -2.0]).log_softmax(-1)
    logits = teacher.clone().requires_grad_()
    found = []
    for _ in range(200):
        student = logits.log_softmax(-1)
        found.append(float(student[:4].detach().exp().sum()))
        topk_divergence(student[None, :4], teacher[None, :4], form=form).sum().backward()  # type: ignore[arg-type]
        with torch.no_grad():
            logits -= 0.1 * logits.grad
        logits.grad = None
    return found


def test_the_raw_form_is_caught_where_the_others_keep_their_mass() -> None:
    assert len(lines(masses_of_training("raw"))) == 1
    for form in ("tail", "generalized", "renorm"):
        assert lines(masses_of_training(form)) == []
