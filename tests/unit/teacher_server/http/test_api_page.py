"""docs/teacher-api.md against the code: example bytes, names and numbers."""

from __future__ import annotations

import re
from typing import get_args, get_type_hints

import numpy as np
import pytest
from prometheus_client.metrics import MetricWrapperBase

from common.protocol.codec import (
    MEDIA_TYPE,
    decode_context,
    decode_request,
    decode_response,
    encode_context,
    encode_request,
    encode_response,
)
from common.protocol.schema import (
    LOGPROB_FLOOR,
    PAD_ID,
    PROTOCOL_VERSION,
    Context,
    ItemError,
    ItemScore,
    ScoreItem,
    ScoreMode,
    ScoreRequest,
    ScoreResponse,
    TeacherInfo,
    as_ids,
)
from teacher_server.client.transport import RETRIED_STATUS
from teacher_server.http.headers import DEADLINE_HEADER, ROUTE_HEADER
from teacher_server.scoring.metrics import MAX_RUNS, Metrics
from tests.support.paths import ROOT

PAGE = (ROOT / "docs/teacher-api.md").read_text(encoding="utf-8")

REQUEST = ScoreRequest(
    "7", "demo", "at_ids", 1.0, 2, (ScoreItem("ab" * 32, as_ids([5, 300]), as_ids([9]), as_ids([[9, 70_000]])),)
)
RESPONSE = ScoreResponse(
    "7",
    "cd" * 32,
    0,
    (
        ItemScore(
            logprobs=np.array([[-0.5, LOGPROB_FLOOR]], dtype=np.float16),
            sampled_logprob=np.array([-0.5], dtype=np.float32),
            tail_logprob=np.array([-0.93275], dtype=np.float32),
            floored=1,
        ),
    ),
)


def example(name: str) -> bytes:
    match = re.search(rf"```hex {name}\n(.*?)```", PAGE, re.DOTALL)
    assert match is not None
    return bytes.fromhex("".join(line.partition("#")[0] for line in match[1].splitlines()))


def test_worked_request() -> None:
    assert example("request") == encode_request(REQUEST)
    assert decode_request(example("request")).items[0].topk_ids is not None


def test_worked_response() -> None:
    assert example("response") == encode_response(RESPONSE)
    (score,) = decode_response(example("response")).results
    assert isinstance(score, ItemScore)
    assert score.tail_logprob[0] == pytest.approx(np.log(1 - np.exp(-0.5)), abs=1e-4)


def test_worked_context() -> None:
    assert example("context") == encode_context(Context("ab" * 32, as_ids([1, 2, 65_536])))
    assert decode_context(example("context"))[1].tolist() == [1, 2, 65_536]


def test_handshake_example_is_one() -> None:
    match = re.search(r"```json\n(.*?)```", PAGE, re.DOTALL)
    assert match is not None
    assert TeacherInfo.model_validate_json(match[1]).protocol == PROTOCOL_VERSION


def test_metrics_are_all_listed_with_their_labels() -> None:
    """The page lists each series with its labels, and no other series."""
    listed: dict[str, set[str]] = {}
    table = PAGE.partition("## Metrics")[2].partition("\n## ")[0]
    for row in re.findall(r"^\| (`.*?) \| (.*?) \|", table, re.MULTILINE):
        listed |= {name: set(re.findall(r"`(\w+)`", row[1])) for name in re.findall(r"`(\w+)`", row[0])}
    metrics = Metrics()
    own = [series for series in vars(metrics).values() if isinstance(series, MetricWrapperBase)]
    assert listed == {series._name.removeprefix("opcd_teacher_"): set(series._labelnames) for series in own}
    assert f"the first {MAX_RUNS} do" in PAGE


def test_names_and_numbers() -> None:
    for mode in get_args(ScoreMode):
        assert f"\n| `{mode}` |" in PAGE
    for code in get_args(get_type_hints(ItemError)["code"]):
        assert f"`{code}`" in PAGE
    assert MEDIA_TYPE in PAGE
    assert f"`{DEADLINE_HEADER}`" in PAGE
    assert f"`{ROUTE_HEADER}`" in PAGE
    assert f"id {PAD_ID:,}" in PAGE
    assert f"−{-LOGPROB_FLOOR:,.0f}" in PAGE
    retried = ", ".join(str(status) for status in sorted(RETRIED_STATUS))
    assert f"A client retries {retried}\n" in PAGE
