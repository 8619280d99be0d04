"""Each bound: the last value that is taken, the first that is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import numpy as np
import pytest

from common.protocol.schema import Context, Ids, ItemError, ScoreItem, ScoreMode, ScoreRequest, TeacherInfo, as_ids
from teacher_server.backends.base import Backend
from teacher_server.scoring.checks import RequestRefused, check_item, check_request
from teacher_server.scoring.metrics import MAX_RUNS, Metrics
from tests.support.teacher_oracle import random_item

INFO = TeacherInfo(
    protocol=1,
    model="m",
    model_fingerprint="a",
    tokenizer_fingerprint="b",
    added_tokens={},
    chat_template_fingerprint="c",
    backend="transformers",
    path="shared_prefix",
    path_cost="none",
    dtype="float32",
    vocab_size=512,
    max_k=64,
    max_sequence_tokens=100,
    max_items=4,
    max_body_bytes=50_000,
    max_request_tokens=64,
    modes={"at_ids": None, "teacher_topk": (1.0,), "sampled": None, "union": None},
    kind="frozen",
    weight_version=0,
)


class Vocabulary:
    """All of a backend that the checks look at."""

    def embeds(self, ids: Ids) -> bool:
        return int(ids.max(initial=0)) < 512


def item(prompt: int = 3, response: int = 4, *, k: int | None = 8, context: str | None = None) -> ScoreItem:
    one = random_item(np.random.default_rng(0), prompt=prompt, response=response, k=k or 1, context=context)
    return one if k is not None else replace(one, topk_ids=None)


def refusal(info: TeacherInfo = INFO, **fields: object) -> str | None:
    """Error code of a request with these `fields`; None if it is valid."""
    whole = {"request_id": "", "run": "r", "mode": "at_ids", "temperature": 1.0, "k": 8, "items": ()}
    try:
        check_request(ScoreRequest(**{**whole, **fields}), info)
    except RequestRefused as error:
        return error.code
    return None


@pytest.mark.parametrize(
    ("taken", "refused", "code"),
    [
        ({"temperature": 1e-3}, {"temperature": 9e-4}, "temperature"),
        ({"temperature": 100.0}, {"temperature": 100.1}, "temperature"),
        ({"mode": "teacher_topk"}, {"mode": "teacher_topk", "temperature": 0.7}, "temperature"),
        ({"mode": "teacher_topk", "k": 1}, {"mode": "teacher_topk", "k": 0}, "k"),
        ({"mode": "union", "k": 64}, {"mode": "union", "k": 65}, "k"),
        ({"k": 0}, {"k": -1}, "k"),
        ({"items": (item(),) * 4}, {"items": (item(),) * 5}, "items"),
        ({"items": (item(response=29),) * 2}, {"items": (item(response=29), item(response=30))}, "tokens"),
        ({"items": (item(response=90),)}, {"items": (item(response=90), item(0, 1))}, "tokens"),
        ({"run": "r" * 128}, {"run": "r" * 129}, "run"),
        ({}, {"run": ""}, "run"),
        ({"run": "größe 7"}, {"run": "r\n"}, "run"),
        ({}, {"run": "r\u2028"}, "run"),
        ({}, {"temperature": float("inf")}, "temperature"),
        ({}, {"temperature": float("nan")}, "temperature"),
    ],
)
def test_requests(taken: dict[str, object], refused: dict[str, object], code: str) -> None:
    assert refusal(**taken) is None
    assert refusal(**refused) == code


def test_a_mode_that_is_not_offered() -> None:
    assert refusal(INFO.model_copy(update={"modes": {"sampled": None}})) == "mode"


def test_a_reply_that_is_too_large() -> None:
    """By the teacher's own ids: 64 of them take 320 bytes a token, the request two or three."""
    fits, too_large = item(response=150, k=None), item(response=160, k=None)
    assert refusal(mode="teacher_topk", k=64, items=(fits,)) is None
    assert refusal(mode="teacher_topk", k=64, items=(too_large,)) == "reply"
    assert refusal(mode="sampled", k=64, items=(too_large,)) is None


def fault(one: ScoreItem, mode: ScoreMode = "at_ids", context: Context | None = None) -> str | None:
    """Error code of an item; None if it is valid."""
    request = ScoreRequest("", "r", mode, 1.0, 8, (one,))
    found = check_item(one, context, request, INFO, cast(Backend, Vocabulary()))
    assert found is None or isinstance(found, ItemError)
    return None if found is None else found.code


def test_lengths() -> None:
    context = Context("a" * 64, as_ids(np.zeros(40)))
    under = {"context": context.hash}
    assert fault(item(20, 40, **under), context=context) is None
    assert fault(item(21, 40, **under), context=context) == "too_long"
    assert fault(item(20, 41, **under), context=context) == "too_long"
    assert fault(item(99, 1)) is None
    assert fault(item(100, 1)) == "too_long"
    assert fault(item(0, 4, **under), context=context) is None
    assert fault(item(0, 4)) == "bad_shape"
    assert fault(item(0, 0)) is None
    assert fault(item(3, 0)) is None


@pytest.mark.parametrize("mode", ["at_ids", "union"])
def test_supports_of_modes_that_need_one(mode: ScoreMode) -> None:
    rows = np.arange(65 * 4).reshape(4, 65)
    assert fault(item(k=None), mode) == "bad_shape"
    assert fault(replace(item(), topk_ids=as_ids(rows[:, :64])), mode) is None
    for wrong in (rows, rows[:, :0], rows[:3, :8], rows[0, :4]):
        assert fault(replace(item(), topk_ids=as_ids(wrong)), mode) == "bad_shape"


def test_an_empty_response_may_have_an_empty_support() -> None:
    for width in (0, 8):
        assert fault(replace(item(3, 0), topk_ids=as_ids(np.empty((0, width))))) is None


@pytest.mark.parametrize("mode", ["teacher_topk", "sampled"])
def test_supports_of_modes_that_take_none(mode: ScoreMode) -> None:
    assert fault(item(k=None), mode) is None
    assert fault(item(), mode) == "bad_shape"


@pytest.mark.parametrize("field", ["prompt_ids", "response_ids"])
def test_ids_of_the_sequence(field: str) -> None:
    for largest, code in ((511, None), (512, "bad_ids")):
        one = item()
        getattr(one, field)[1] = largest
        assert fault(one) == code


def test_ids_of_the_support_may_be_the_students_alone() -> None:
    one = item()
    assert one.topk_ids is not None
    one.topk_ids[2, 3] = 70_000
    assert fault(one) is None


def test_made_up_runs_share_one_name_in_the_metrics() -> None:
    metrics = Metrics()
    names = {metrics.run("t", f"run-{n}") for n in range(MAX_RUNS + 50)}
    assert len(names) == MAX_RUNS + 1
    assert metrics.run("t", "run-0") == "t/run-0"
    assert metrics.run("t", f"run-{MAX_RUNS}") == "t/other"
    assert metrics.known("u", "mine") == "u/other"
    assert metrics.run("u", "mine") == metrics.known("u", "mine") == "u/mine"  # the other tenant's are its own
