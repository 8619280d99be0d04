"""Verdicts of the GPU check-up, and their forms."""

from __future__ import annotations

import json
import math

import pytest

from tests.gpu.report import Figure, Result, as_json, markdown, summary


@pytest.mark.parametrize(
    ("figure", "ok"),
    [
        (Figure("a", 1.0, at_most=1.0), True),
        (Figure("a", 1.1, at_most=1.0), False),
        (Figure("a", 0.9, at_least=1.0), False),
        (Figure("a", 1.0, at_least=1.0), True),
        (Figure("a", math.nan, at_most=1.0), False),
        (Figure("a", math.nan, at_least=1.0), False),
        (Figure("a", 1e9), True),
        (Figure("a", None, at_most=1.0), True),
    ],
)
def test_a_figure_is_ok_within_its_limits_only(figure: Figure, ok: bool) -> None:
    assert figure.ok is ok


def judged(*figures: Figure) -> Result:
    result = Result("head", figures=list(figures), seconds=2.0)
    result.judge()
    return result


def test_one_broken_limit_fails_the_check_and_is_named() -> None:
    result = judged(Figure("peak", 2.0, "GiB", at_most=3.0), Figure("time", 9.0, "s", at_most=1.0))
    assert (result.verdict, result.reason) == ("FAIL", "beyond the limit: time")
    assert result.line() == "FAIL head       beyond the limit: time · peak 2 GiB (≤ 3) · time 9 s (≤ 1)  [2.0 s]"


@pytest.mark.parametrize("figures", [(), (Figure("speed", 3.0),), (Figure("peak", None, at_most=1.0),)])
def test_a_check_without_a_judged_figure_fails(figures: tuple[Figure, ...]) -> None:
    assert judged(*figures).verdict == "FAIL"


def test_every_form_has_all_results() -> None:
    results = [
        judged(Figure("peak", 1.0, "GiB", at_most=2.0)),
        Result("tp2", "SKIP", reason="needs 2 GPUs, this check-up has 1"),
        Result("ipc", "FAIL", reason="out of memory: CUDA | out"),
    ]
    assert summary(results) == "1 OK, 1 FAIL (ipc), 1 SKIP"
    rows = markdown(results, {"machine": "one GPU"}).splitlines()
    assert rows[0] == "machine: one GPU"
    assert rows[4:] == [
        "| head | OK | peak 1 GiB (≤ 2) | 2 |",
        "| tp2 | SKIP | needs 2 GPUs, this check-up has 1 | 0 |",
        "| ipc | FAIL | out of memory: CUDA \\| out | 0 |",
    ]
    tree = json.loads(json.dumps(as_json(results, {"machine": "one GPU"})))
    assert [one["verdict"] for one in tree["results"]] == ["OK", "SKIP", "FAIL"]
    assert tree["results"][0]["figures"][0]["at_most"] == 2.0
