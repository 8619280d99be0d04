"""Whether an answer is right: small pure functions chosen by ``eval.grader``."""

from __future__ import annotations

import re
from collections.abc import Callable

from common.config import ConfigError

Grader = Callable[[str, str], bool]
"""(answer of the model, expected answer) -> right or wrong."""

NAMES = ("exact", "exact_casefold", "contains", "regex:PATTERN")


def make_grader(spec: str) -> Grader:
    """The grader that `spec` names; both texts are stripped before they are compared.

    ``exact``, ``exact_casefold`` (ignoring case), ``contains`` (the expected answer occurs in the model's), or
    ``regex:PATTERN``: the pattern's first group (the whole match where it has none), searched in the model's answer,
    equals the expected one; no match is wrong. Raises ConfigError for anything else.
    """
    kind, colon, pattern = spec.partition(":")
    if spec == "exact":
        return lambda answer, expected: answer.strip() == expected.strip()
    if spec == "exact_casefold":
        return lambda answer, expected: answer.strip().casefold() == expected.strip().casefold()
    if spec == "contains":
        return lambda answer, expected: expected.strip() in answer
    if kind == "regex" and colon:
        return _regex(spec, pattern)
    raise ConfigError(f"bad value eval.grader={spec!r}: valid are {', '.join(NAMES)}")


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
        return found is not None and found.strip() == expected.strip()

    return grade
