"""The task ``code-style``: short Python functions, to be written by the house rules of a system prompt.

The rules are in ``deploy/configs/code_style/system.txt``; `follows_rules` checks them. A problem combines a choice
("the even numbers") with a result ("the sum of"), so that each has unit tests.
"""

from __future__ import annotations

import ast
import json
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from deploy.tasks.folders import whole_folder, write_lines

SPLITS = {"train": 96, "valid": 32, "eval": 64}
OTHER_ROWS = 32
RUN_S = 5
"""CPU seconds for one answer's tests; twice as many on the clock."""
ONE_EXPRESSION = (
    "Reply with one Python lambda expression on a single line, for example `lambda text: len(text)`. "
    "No code block, no name, no annotation, no explanation."
)
"""Another system prompt, which a distilled model must still obey."""

Choice = tuple[str, str, Callable[[Any], bool]]
"""(name in the function's name, words of the prompt, whether an element is chosen)."""
Result = tuple[str, str, Callable[[Sequence[Any], Sequence[Any]], Any]]
"""(name in the function's name, words around the choice, function of the chosen elements and of all)."""
VOWELS = "aeiou"


@dataclass(frozen=True)
class Kind:
    """Problems about one type of argument: each of `choices` with each of `results`."""

    parameter: str
    source: str
    choices: tuple[Choice, ...]
    results: tuple[Result, ...]
    inputs: tuple[Any, ...]


NUMBERS = Kind(
    "numbers",
    "in a list of integers",
    (
        ("even", "even numbers", lambda n: n % 2 == 0),
        ("odd", "odd numbers", lambda n: n % 2 == 1),
        ("positive", "positive numbers", lambda n: n > 0),
        ("negative", "negative numbers", lambda n: n < 0),
        ("large", "numbers greater than 10", lambda n: n > 10),
        ("small", "numbers less than 5", lambda n: n < 5),
        ("by_three", "numbers divisible by 3", lambda n: n % 3 == 0),
        ("two_digit", "numbers from 10 to 99", lambda n: 10 <= n <= 99),
    ),
    (
        ("sum", "the sum of the {}", lambda some, every: sum(some)),
        ("count", "the number of {}", lambda some, every: len(some)),
        ("product", "the product of the {}", lambda some, every: reduce(lambda a, b: a * b, some, 1)),
        ("squares", "a list of the squares of the {}", lambda some, every: [n * n for n in some]),
        ("doubled", "a list of the doubles of the {}", lambda some, every: [2 * n for n in some]),
        ("sorted", "a sorted list of the {}", lambda some, every: sorted(some)),
        ("reversed", "a list, in reverse order, of the {}", lambda some, every: list(some)[::-1]),
        (
            "positions",
            "a list of the positions, counted from 0, of the {}",
            lambda some, every: _positions(some, every),
        ),
    ),
    ([3, 12, -4, 7, 30, 9], [2, 15, 15, -9, 100, 4, 1], [-6, -1, 8, 21], []),
)
WORDS = Kind(
    "words",
    "in a list of words",
    (
        ("long", "words with more than four letters", lambda w: len(w) > 4),
        ("short", "words with fewer than four letters", lambda w: len(w) < 4),
        ("vowel_first", "words that begin with a vowel", lambda w: w[0] in VOWELS),
        ("plural", "words that end in the letter s", lambda w: w.endswith("s")),
        ("with_a", "words that contain the letter a", lambda w: "a" in w),
        ("without_e", "words that do not contain the letter e", lambda w: "e" not in w),
        ("palindrome", "words that read the same backwards", lambda w: w == w[::-1]),
        ("even_length", "words with an even number of letters", lambda w: len(w) % 2 == 0),
    ),
    (
        ("count", "the number of {}", lambda some, every: len(some)),
        ("list", "a list of the {}", lambda some, every: list(some)),
        ("upper", "a list, in upper case, of the {}", lambda some, every: [w.upper() for w in some]),
        ("joined", "a string, joined by commas, of the {}", lambda some, every: ",".join(some)),
        ("lengths", "a list of the lengths of the {}", lambda some, every: [len(w) for w in some]),
        ("initials", "a list of the first letters of the {}", lambda some, every: [w[0] for w in some]),
        ("sorted", "an alphabetically sorted list of the {}", lambda some, every: sorted(some)),
        ("letters", "the total number of letters of the {}", lambda some, every: sum(len(w) for w in some)),
    ),
    (
        ["apple", "level", "sea", "trees", "ox"],
        ["noon", "ideas", "bus", "stone", "a"],
        ["eve", "garden", "us", "lamp"],
        [],
    ),
)
CHARACTERS = Kind(
    "text",
    "in a text",
    (
        ("vowels", "vowels (a, e, i, o, u)", lambda c: c.lower() in VOWELS),
        ("digits", "digits", str.isdigit),
        ("capitals", "upper-case letters", str.isupper),
        ("small_letters", "lower-case letters", str.islower),
        ("spaces", "spaces", lambda c: c == " "),
        ("letters", "letters", str.isalpha),
        ("commas", "commas", lambda c: c == ","),
        ("a_or_b", "characters that are a or b", lambda c: c in "ab"),
    ),
    (
        ("count", "the number of {}", lambda some, every: len(some)),
        ("only", "a string of only the {}", lambda some, every: "".join(some)),
        ("without", "the text without the {}", lambda some, every: "".join(c for c in every if c not in some)),
        ("starred", "a text with a star (*) in place of each of the {}", lambda some, every: _starred(some, every)),
        (
            "positions",
            "a list of the positions, counted from 0, of the {}",
            lambda some, every: _positions(some, every),
        ),
        ("any", "True if there are any {}, else False", lambda some, every: len(some) > 0),
        ("reversed", "a string, in reverse order, of the {}", lambda some, every: "".join(some)[::-1]),
        ("different", "the number of different {}", lambda some, every: len(set(some))),
    ),
    ("Anna has 2 cats, 1 bed", "no BIG deal", "b4, C5 and a7", ""),
)
KINDS = (NUMBERS, WORDS, CHARACTERS)


def _positions(some: Sequence[Any], every: Sequence[Any]) -> list[int]:
    return [place for place, one in enumerate(every) if one in some]


def _starred(some: Sequence[str], every: Sequence[str]) -> str:
    return "".join("*" if one in some else one for one in every)


@dataclass(frozen=True)
class Problem:
    """A function to write, and its tests."""

    name: str
    prompt: str
    call: str
    tests: tuple[tuple[Any, Any], ...]


def problems() -> Iterator[Problem]:
    """Yield every problem, 192 in all."""
    for kind in KINDS:
        for choice, chosen, keeps in kind.choices:
            for result, wanted, function in kind.results:
                name = f"{result}_{choice}"
                tests = tuple((one, function([x for x in one if keeps(x)], one)) for one in kind.inputs)
                words = f"returns {wanted.format(f'{chosen} {kind.source}')}"
                yield Problem(name, words, f"{name}({kind.parameter})", tests)


def prepare_code_style(folder: Path, *, seed: int = 0) -> bool:
    """Write the rows of `SPLITS`, ``tests.jsonl`` and ``expression.jsonl``, both about problems of ``eval``.

    Returns False without changes if `folder` exists.
    """
    if folder.exists():
        return False
    left = list(problems())
    random.Random(seed).shuffle(left)
    with whole_folder(folder) as partial:
        for name, count in SPLITS.items():
            some, left = left[:count], left[count:]
            write_lines(partial / f"{name}.jsonl", (_row(one, "rules") for one in some))
        write_lines(partial / "tests.jsonl", (_row(one, "tests") for one in some[:OTHER_ROWS]))
        write_lines(
            partial / "expression.jsonl", (_row(one, "expression", ONE_EXPRESSION) for one in some[:OTHER_ROWS])
        )
    return True


def _row(problem: Problem, checks: str, system: str | None = None) -> dict[str, Any]:
    task = f"Write a Python function `{problem.call}` that {problem.prompt}."
    if system is not None:
        task = f"Write a function that {problem.prompt}."
    turns = [{"role": "user", "content": task}]
    if system is not None:
        turns.insert(0, {"role": "system", "content": system})
    answer = {"checks": checks, "name": problem.name, "tests": problem.tests}
    return {"id": f"{checks}-{problem.name}", "messages": turns, "answer": json.dumps(answer)}


def grade(answer: str, expected: str) -> bool:
    """Grader ``deploy.tasks.code_style:grade``: the row's `checks` are ``rules``, ``tests`` or ``expression``."""
    row = json.loads(expected)
    if row["checks"] == "tests":
        return passes(functions_of(answer), row["name"], row["tests"])
    return follows_rules(answer) if row["checks"] == "rules" else is_expression(answer)


def functions_of(answer: str) -> str:
    """Return imports and functions of an answer's first code block, or of the whole answer if it has no block.

    What else the block holds, for example a wrong assert, says nothing about the function. Empty if it is no Python.
    """
    block = re.search(r"```(?:python)?\n(.*?)(?:```|\Z)", answer, re.DOTALL)
    body = _parsed(block.group(1) if block else answer)
    kept: list[ast.stmt] = [one for one in body if isinstance(one, ast.FunctionDef | ast.Import | ast.ImportFrom)]
    return ast.unparse(ast.Module(kept, type_ignores=[]))


def is_expression(answer: str) -> bool:
    """Return True for one lambda expression on one line, with or without a code block around it."""
    line = re.sub(r"\A```(?:python)?\n(.*)\n```\Z", r"\1", answer.strip(), flags=re.DOTALL).strip()
    match _parsed(line):
        case [ast.Expr(ast.Lambda())]:
            return "\n" not in line
    return False


def _parsed(code: str) -> list[ast.stmt]:
    try:
        return ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []


def follows_rules(answer: str) -> bool:
    """Return True if an answer keeps all house rules. Its function may be wrong all the same."""
    block = re.fullmatch(r"```python\n(.*?\n)```", answer.strip(), re.DOTALL)
    if block is None or "```" in block.group(1) or "#" in block.group(1):
        return False
    match _parsed(block.group(1)):
        case [ast.FunctionDef() as function, ast.Assert() as shown]:
            pass
        case _:
            return False
    nodes = list(ast.walk(function))
    return (
        function.returns is not None
        and all(one.annotation is not None for one in function.args.args)
        and _one_line_docstring(function)
        and function.name in _called(shown)
        and shown.lineno - (function.end_lineno or 0) == 2  # one empty line between them
        and "print" not in _called(function)
        and not any(isinstance(one, ast.Import | ast.ImportFrom) for one in nodes)
    )


def _one_line_docstring(function: ast.FunctionDef) -> bool:
    text = ast.get_docstring(function, clean=False)
    return text is not None and "\n" not in text and text.startswith("Return ") and text.endswith(".")


def _called(node: ast.AST) -> set[str]:
    """Names of the functions that a piece of code calls."""
    calls = (one.func for one in ast.walk(node) if isinstance(one, ast.Call))
    return {function.id for function in calls if isinstance(function, ast.Name)}


def passes(code: str, name: str, tests: Sequence[tuple[Any, Any]]) -> bool:
    """Run `code` and the tests of its function `name` in another process, with limits of time, memory and file size.

    The limits are for mistakes. The process is no sandbox: it can read and write what the user can.
    """
    checks = "".join(f"assert {name}({argument!r}) == {wanted!r}\n" for argument, wanted in tests)
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = subprocess.run(
                [sys.executable, "-I", "-S", "-c", _LIMITED],
                input=f"{code}\n{checks}", text=True, errors="replace", cwd=folder, env={}, capture_output=True,
                timeout=2 * RUN_S,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return False
    return found.returncode == 0 and found.stdout.endswith("passed\n")


_LIMITED = f"""
import resource, sys
for limit, most in ((resource.RLIMIT_CPU, {RUN_S}), (resource.RLIMIT_AS, 1 << 30), (resource.RLIMIT_FSIZE, 1 << 20)):
    resource.setrlimit(limit, (most, most))
exec(compile(sys.stdin.read(), "answer", "exec"), {{"__name__": "answer"}})
print("passed")
"""
