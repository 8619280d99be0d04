"""Validation refuses incomplete scores and scores of another item."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest

from common.protocol.schema import LOGPROB_FLOOR, PAD_ID, ItemScore, ScoreItem, ScoreMode, as_ids
from teacher_server.client.validation import score_error
from tests.support.teacher_oracle import random_item

TOKENS, ASKED, OWN = 5, 8, 3


def pair(mode: ScoreMode, tokens: int = TOKENS) -> tuple[ScoreItem, ItemScore]:
    """An item and a score that fits it."""
    item = random_item(np.random.default_rng(0), prompt=4, response=tokens, k=ASKED)
    if mode not in ("at_ids", "union"):
        item = replace(item, topk_ids=None)
    own = np.full((tokens, OWN), PAD_ID)
    ids = {"teacher_topk": own, "union": None if item.topk_ids is None else np.hstack([item.topk_ids, own])}.get(mode)
    width = {"at_ids": ASKED, "teacher_topk": OWN, "union": ASKED + OWN, "sampled": 0}[mode]
    return item, ItemScore(
        logprobs=np.full((tokens, width), LOGPROB_FLOOR, dtype=np.float16),
        sampled_logprob=np.full(tokens, 1e-7, dtype=np.float32),
        tail_logprob=np.zeros(tokens, dtype=np.float32),
        topk_ids=None if ids is None else as_ids(ids),
    )


@pytest.mark.parametrize("mode", get_args(ScoreMode))
@pytest.mark.parametrize("tokens", [0, 1, TOKENS])
def test_a_whole_score_fits(mode: ScoreMode, tokens: int) -> None:
    item, score = pair(mode, tokens)
    assert score_error(score, item, mode, OWN) is None


@pytest.mark.parametrize("mode", get_args(ScoreMode))
@pytest.mark.parametrize("field", ["logprobs", "sampled_logprob", "tail_logprob", "topk_ids"])
def test_a_row_too_few_is_named(mode: ScoreMode, field: str) -> None:
    item, score = pair(mode)
    whole = getattr(score, field)
    if whole is None:
        assert "ids of shape" in str(score_error(replace(score, topk_ids=as_ids([[1]])), item, mode, OWN))
        return
    error = score_error(replace(score, **{field: whole[:-1]}), item, mode, OWN)
    assert error is not None
    assert "(4" in error
    assert "(5" in error


def test_a_column_too_few_is_named() -> None:
    item, score = pair("at_ids")
    assert "(5, 7)" in str(score_error(replace(score, logprobs=score.logprobs[:, :-1]), item, "at_ids", OWN))
    item, score = pair("teacher_topk")
    assert "None" in str(score_error(replace(score, topk_ids=None), item, "teacher_topk", OWN))
    assert "(5, 3)" in str(score_error(score, item, "teacher_topk", OWN + 1))


def test_other_ids_than_requested() -> None:
    item, score = pair("union")
    assert score.topk_ids is not None
    swapped = score.topk_ids.copy()
    swapped[2, [0, 1]] = swapped[2, [1, 0]]
    assert "other ids" in str(score_error(replace(score, topk_ids=swapped), item, "union", OWN))


@pytest.mark.parametrize("field", ["logprobs", "sampled_logprob", "tail_logprob"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf"), float("inf"), 0.5, -10_100.0])
def test_values_that_are_not_logprobs(field: str, value: float) -> None:
    item, score = pair("at_ids")
    damaged: Any = getattr(score, field).copy()
    damaged[3] = value
    assert "expected -10000 to 0" in str(score_error(replace(score, **{field: damaged}), item, "at_ids", OWN))
