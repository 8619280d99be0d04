"""Graders: plain text, tags, mathematics, scorers of procedural tasks, a user's own."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common.config.model import ConfigError
from common.data.sources import read_records
from common.evaluation.answers import final_answer, strip_thinking
from common.evaluation.graders import NAMES, make_grader


@pytest.mark.parametrize(
    ("spec", "answer", "expected", "right"),
    [
        ("exact", " cats ", "cats", True),
        ("exact", "Cats", "cats", False),
        ("exact_casefold", "CATS", "cats", True),
        ("contains", "I say cats.", "cats", True),
        ("contains", "I say cat.", "cats", False),
        (r"regex:<answer>(.*?)</answer>", "so <answer> B </answer>", "B", True),
        (r"regex:<answer>(.*?)</answer>", "B", "B", False),
        (r"regex:[a-z]+s", "12 cats", "cats", True),
    ],
)
def test_graders(spec: str, answer: str, expected: str, right: bool) -> None:
    assert make_grader(spec)(answer, expected) is right


@pytest.mark.parametrize("spec", ["exakt", "regex", "regex:(", ""])
def test_an_unknown_grader_is_a_config_error(spec: str) -> None:
    with pytest.raises(ConfigError, match=r"eval\.grader"):
        make_grader(spec)


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("a </think> b", " b"),
        ("a</think>b</think>c", "c"),
        ("never thought", "never thought"),
        ("cut off <think> x", "cut off <think> x"),
    ],
)
def test_only_what_follows_the_thinking_counts(text: str, rest: str) -> None:
    assert strip_thinking(text) == rest


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("It is <answer>B</answer>.", True),
        ("<answer> b\n</answer>", True),
        ("<ANSWER>B</ANSWER>", True),
        ("<answer>A</answer> no, <answer>B</answer>", True),
        ("<answer>B</answer> no, <answer>A</answer>", False),
        ("B", False),
        ("<answer>B", False),
        ("<answer>B</answer></think> I give up", False),
        ("<answer>A</answer></think><answer>B</answer>", True),
        ("<answer>B or C</answer>", True),  # the first letter counts
        ("<answer>C or B</answer>", False),
        ("<answer>(B)</answer>", True),
        ("<answer>b. Aspirin</answer>", True),
        ("<answer>Option B</answer>", True),
        ("<answer>A drug: (B)</answer>", True),  # a letter in brackets goes first
        ("<answer>none</answer>", False),
    ],
)
def test_answer_tag(answer: str, right: bool) -> None:
    assert make_grader("answer_tag")(answer, "B") is right


@pytest.mark.parametrize(
    ("answer", "right"), [("Yes", True), ("yes\n", True), ("yes, clearly", False), ("no", False), ("", False)]
)
def test_a_label_of_an_answer_tag_is_compared_whole(answer: str, right: bool) -> None:
    assert make_grader("answer_tag")(f"<answer>{answer}</answer>", "yes") is right


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Answer: 12", "12"),
        ("**Answer:** $12$.", "12"),
        ("Answer: 1\nno\nanswer: 2\nthat is all", "2"),
        (r"so \boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
        (r"\boxed{1} and \boxed{2}", "2"),
        (r"Answer: \boxed{3}", "3"),
        (r"\boxed{4}. Answer: 5", "5"),
        (r"Answer: 5, that is \boxed{4}", "4"),
        (r"\boxed{open", None),
        ("Answer: 7</think>I do not know", None),
        ("Answer: 7</think>Answer: 8", "8"),
        ("twelve", None),
        ("Answer:", None),
    ],
)
def test_the_final_answer_of_a_text(text: str, found: str | None) -> None:
    assert final_answer(text) == found


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        (r"\boxed{\frac{1}{2}}", "0.5", True),
        ("Answer: 3/4", r"\frac{3}{4}", True),
        ("Answer: 1,000", "1000", True),
        (r"Answer: $x^2+2x+1$", "(x+1)^2", True),
        (r"\boxed{33}", r"\boxed{33}", True),
        ("Answer: 33", "34", False),
        ("33", "33", False),
        (r"\boxed{(}", "34", False),
    ],
)
def test_mathematics_is_compared_as_expressions(answer: str, expected: str, right: bool) -> None:
    grade = make_grader("math")
    assert grade(answer, expected) is right
    with ThreadPoolExecutor(1) as pool:  # where signals, and with them time limits, are not to be had
        assert pool.submit(grade, answer, expected).result() is right


def test_a_procedural_task_is_scored_by_its_own_scorer() -> None:
    (_, row), *_ = read_records(Path("reasoning_gym:chain_sum?size=2&seed=3"))
    entry = json.loads(row["answer"])
    grade = make_grader("reasoning_gym")
    assert grade(f"thinking</think><answer> {entry['answer']} </answer>", row["answer"])
    assert grade(entry["answer"], row["answer"])
    assert not grade("<answer>0.5</answer>", row["answer"])


def shorter(answer: str, expected: str) -> int:
    """A user's grader whose result is only truthy or falsy."""
    return len(answer) < len(expected)


def test_a_user_defined_grader_is_named_by_its_path() -> None:
    grade = make_grader(f"{__name__}:shorter")
    assert grade("a", "bb") is True
    assert grade("bb", "a") is False


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ("no.such.module:grade", "No module named"),
        (f"{__name__}:longer", "longer"),
        (f"{__name__}:NAMES", "not a callable"),
        (f"{__name__}:test_answer_tag_", "test_answer_tag_"),
        ("json:JSONDecodeError", "missing a required argument"),
    ],
)
def test_an_unusable_grader_lists_the_valid_ones(spec: str, part: str) -> None:
    with pytest.raises(ConfigError, match=r"eval\.grader") as caught:
        make_grader(spec)
    assert part in str(caught.value)
    assert "answer_tag" in str(caught.value)


def test_an_unknown_name_lists_all() -> None:
    with pytest.raises(ConfigError) as caught:
        make_grader("mathe")
    assert all(name in str(caught.value) for name in NAMES)


def test_a_grader_whose_package_is_missing_says_which_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.evaluation.graders.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"`math` needs the `math` extra"):
        make_grader("math")
    with pytest.raises(ConfigError, match=r"`reasoning_gym` needs the `reasoning` extra"):
        make_grader("reasoning_gym")


def test_a_pattern_that_would_search_without_end_counts_as_wrong(caplog: pytest.LogCaptureFixture) -> None:
    answer = "- " + "word" * 20
    assert not make_grader(r"regex:\A- (?:\S+ ?){1,40}\n")(answer, "x")
    assert "no match within 1 s in an answer of 82 characters" in caplog.text
