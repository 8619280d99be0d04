"""The task ``code-style``: disjoint sets, tests that a right function passes, and rules that each count."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.config.loader import load_config
from deploy.tasks.code_style import (
    OTHER_ROWS,
    SPLITS,
    follows_rules,
    grade,
    passes,
    prepare_code_style,
    problems,
)
from tests.support.paths import ROOT

CONFIG = ROOT / "deploy/configs/code_style/small.yaml"
GOOD = '''```python
def count_even(numbers: list[int]) -> int:
    """Return the number of even numbers."""
    return sum(number % 2 == 0 for number in numbers)

assert count_even([1, 2]) == 1
```'''


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_sets_are_disjoint_and_the_configuration_names_them(tmp_path: Path) -> None:
    assert prepare_code_style(tmp_path / "models/code-style")
    assert not prepare_code_style(tmp_path / "models/code-style")
    folder = tmp_path / "models/code-style"
    ids = [str(row["id"]) for name in SPLITS for row in rows(folder / f"{name}.jsonl")]
    assert len(ids) == len(set(ids)) == sum(SPLITS.values())
    config = load_config(CONFIG)
    assert config.data.eval is not None
    named = [config.data.train, config.data.valid, config.data.eval, *config.eval.ood.values()]
    assert all((tmp_path / str(path)).is_file() for path in named)
    held_out = {str(row["id"]).removeprefix("rules-") for row in rows(folder / "eval.jsonl")}
    for name, prefix in (("tests", "tests-"), ("expression", "expression-")):
        other = {str(row["id"]).removeprefix(prefix) for row in rows(folder / f"{name}.jsonl")}
        assert len(other) == OTHER_ROWS
        assert other <= held_out


def test_names_and_tasks_are_unique_and_tests_tell_problems_apart() -> None:
    found = list(problems())
    assert len(found) == len({one.name for one in found}) == len({one.prompt for one in found}) == 192
    assert all(len({repr(wanted) for _, wanted in one.tests}) > 1 for one in found), "a constant would pass"


def test_good_code_follows_the_rules_and_each_rule_counts() -> None:
    assert follows_rules(GOOD)
    for old, new in (
        ("```python\n", "```\n"),
        ("```python\n", "Here it is:\n```python\n"),
        ("1\n```", "1\n```\nThat counts them."),
        ("numbers: list[int]", "numbers"),
        (" -> int", ""),
        ('"""Return the number', '"""Count the number'),
        ("even numbers.", "even numbers"),
        ("even numbers.", "even\n    numbers."),
        ("    return", "    # count them\n    return"),
        ("    return", "    print(numbers)\n    return"),
        ("    return", "    import math\n    return"),
        ("\n\nassert", "\nassert"),
        ("\n\nassert", "\n\n\nassert"),
        ("assert count_even([1, 2])", "assert len([1])"),
        ("assert count_even([1, 2]) == 1\n", ""),
        ("== 1\n", "== 1\nassert count_even([]) == 0\n"),
        ("return sum(", "return sum(("),
    ):
        assert old in GOOD
        assert not follows_rules(GOOD.replace(old, new, 1)), new


def test_the_rules_shown_to_the_teacher_are_the_rules_that_are_graded() -> None:
    system = (CONFIG.parent / "system.txt").read_text()
    examples = ["```python" + part for part in system.split("\n```python")[1:]]
    blocks = [example[: example.index("\n```") + 4] for example in examples]
    assert len(blocks) == 3
    assert all(map(follows_rules, blocks))


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (GOOD, True),
        (GOOD.replace("== 1", "== 2"), True),  # the assert is wrong, the function is not
        (GOOD.replace("% 2 == 0", "% 2 == 1"), False),
        ("Sure!\n" + GOOD + "\nand more", True),
        ("no code", False),
        ("```python\nwhile True: pass\n```", False),
        ("```python\ndef count_even(numbers):\n    raise SystemExit(0)\n```", False),
        ("```python\ndef count_even(numbers):\n    return '\0'\n```", False),
        ("```python\nimport math\ndef count_even(numbers):\n    return math.floor(1)\n```", False),
    ],
)
def test_unit_tests_decide_about_the_function(answer: str, right: bool) -> None:
    expected = {"checks": "tests", "name": "count_even", "tests": [[[1, 2, 4], 2], [[3], 0]]}
    assert grade(answer, json.dumps(expected)) is right


def test_a_function_that_never_ends_or_takes_all_memory_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not passes("def f(x):\n    return [0] * 10**10", "f", [(1, 2)])
    monkeypatch.setattr("deploy.tasks.code_style.RUN_S", 0.5)
    assert not passes("def f(x):\n    while True: pass", "f", [(1, 2)])


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (" lambda xs: sum(xs)\n", True),
        ("```python\nlambda xs: sum(xs)\n```", True),
        ("f = lambda xs: sum(xs)", False),
        ("lambda xs:\\\n sum(xs)", False),
        ("Here it is:\n```python\nlambda xs: sum(xs)\n```", False),
        (GOOD, False),
        ("sum", False),
        ("lambda xs: sum(xs", False),
    ],
)
def test_an_expression_is_one_lambda_on_one_line(answer: str, right: bool) -> None:
    assert grade(answer, json.dumps({"checks": "expression", "name": "f", "tests": []})) is right
