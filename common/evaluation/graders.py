"""Whether an answer is right: small pure functions chosen by ``eval.grader``.

A grader is a function ``(answer of the model, expected answer) -> bool``; one of your own is named by its path,
``package.module:attribute``.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

from common.config.model import ConfigError

Grader = Callable[[str, str], bool]
"""(answer of the model, expected answer) -> right or wrong."""

THINKING_ENDS = "</think>"
_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)


def after_thinking(text: str) -> str:
    """What follows the last ``</think>``; the whole text where there is none."""
    return text.rpartition(THINKING_ENDS)[2]


def exact(answer: str, expected: str) -> bool:
    """Equal, white space around left out."""
    return answer.strip() == expected.strip()


def exact_casefold(answer: str, expected: str) -> bool:
    """`exact`, ignoring case."""
    return exact(answer.casefold(), expected.casefold())


def contains(answer: str, expected: str) -> bool:
    """The expected answer occurs in the model's."""
    return expected.strip() in answer


def answer_tag(answer: str, expected: str) -> bool:
    """What stands in the last ``<answer>…</answer>`` behind the thinking, ignoring case; without a tag it is wrong.

    As the paper grades multiple choice and labels.
    """
    found = _TAG.findall(after_thinking(answer))
    return bool(found) and exact_casefold(found[-1], expected)


def _math() -> Grader:
    _need("math", module="math_verify", extra="math")
    from common.evaluation.math_answers import grade

    return grade


def _reasoning_gym() -> Grader:
    _need("reasoning_gym", module="reasoning_gym", extra="reasoning")
    from reasoning_gym import get_score_answer_fn

    def grade(answer: str, expected: str) -> bool:
        entry = json.loads(expected)
        found = _TAG.findall(after_thinking(answer))
        score = get_score_answer_fn(entry["metadata"]["source_dataset"])
        return score((found[-1] if found else after_thinking(answer)).strip(), entry) == 1.0

    return grade


GRADERS: Mapping[str, Callable[[], Grader]] = {
    "exact": lambda: exact,
    "exact_casefold": lambda: exact_casefold,
    "contains": lambda: contains,
    "answer_tag": lambda: answer_tag,
    "math": _math,
    "reasoning_gym": _reasoning_gym,
}
"""Name -> what makes the grader; some need a package of an extra."""

NAMES = (*GRADERS, "regex:PATTERN", "package.module:attribute")


def make_grader(spec: str) -> Grader:
    """The grader that `spec` names.

    ``regex:PATTERN``: the pattern's first group (the whole match where it has none), searched in the model's answer,
    equals the expected one; no match is wrong. ``math`` compares the last ``Answer:`` line or ``\\boxed{}`` as
    mathematics. ``reasoning_gym`` asks the scorer of the row's task (rows of a ``reasoning_gym:`` source); only the
    full score is right. Raises ConfigError, naming what is valid, for anything else.
    """
    if spec in GRADERS:
        return GRADERS[spec]()
    kind, colon, rest = spec.partition(":")
    if kind == "regex" and colon:
        return _regex(spec, rest)
    if colon:
        return _imported(spec, kind, rest)
    raise ConfigError(f"bad value eval.grader={spec!r}: valid are {', '.join(NAMES)}")


def _need(grader: str, *, module: str, extra: str) -> None:
    if find_spec(module) is None:
        raise ConfigError(f"eval.grader `{grader}` needs the `{extra}` extra: pip install 'opcd[{extra}]'")


def _imported(spec: str, module: str, attribute: str) -> Grader:
    try:
        found: Any = importlib.import_module(module)
        for name in attribute.split("."):
            found = getattr(found, name)
        inspect.signature(found).bind("answer", "expected")
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ConfigError(
            f"bad value eval.grader={spec!r}: {error}; expected package.module:attribute of a function "
            f"(answer, expected) -> bool, or one of {', '.join(NAMES[:-1])}"
        ) from error
    return lambda answer, expected: bool(found(answer, expected))


def _regex(spec: str, pattern: str) -> Grader:
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ConfigError(f"bad value eval.grader={spec!r}: {error}") from error

    def grade(answer: str, expected: str) -> bool:
        match = compiled.search(answer)
        if match is None:
            return False
        found = match.group(1) if compiled.groups else match.group(0)
        return found is not None and exact(found, expected)

    return grade
