"""Graders: functions that tell a right answer from a wrong one, chosen by ``eval.grader``."""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import re
import threading
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, cast

import regex

from common.config.model import ConfigError
from common.evaluation.answers import final_answer, strip_thinking, tagged_answer, tidy

Grader = Callable[[str, str], bool]
"""(answer of the model, expected answer) -> right or wrong."""

_LETTER = re.compile(r"[A-Da-d]")
_BRACKETED_LETTER = re.compile(r"\([A-Da-d]\)")
log = logging.getLogger(__name__)

REGEX_TIMEOUT_S = 1.0
"""Limit for one answer: a pattern with nested repetitions can take longer than any run."""
MATH_TIMEOUT_S = 5
"""Limit for one expression: a model's text can keep a computer algebra system busy without end."""


def exact(answer: str, expected: str) -> bool:
    """Equal except for white space at both ends."""
    return answer.strip() == expected.strip()


def exact_casefold(answer: str, expected: str) -> bool:
    """Equal except for case and white space at both ends."""
    return exact(answer.casefold(), expected.casefold())


def contains(answer: str, expected: str) -> bool:
    """The expected answer occurs in the model's answer."""
    return expected.strip() in answer


def answer_tag(answer: str, expected: str) -> bool:
    """The last ``<answer>`` tag after the thinking holds the expected answer, ignoring case; no tag is wrong.

    If a letter from A to D is expected, the tag's choice counts: the first such letter in brackets, or else the first
    such letter of the tag, as ``(B)``, ``B. Aspirin`` and ``Option B`` have it. The paper's code grades this way.
    """
    found = tagged_answer(answer)
    if found is None:
        return False
    if _LETTER.fullmatch(expected.strip()) is None:
        return exact_casefold(found, expected)
    choice = _BRACKETED_LETTER.search(found) or _LETTER.search(found)
    return choice is not None and exact_casefold(choice.group(0).strip("()"), expected)


def math(answer: str, expected: str) -> bool:
    """The final answer equals the expected one, as text or as mathematics (``math-verify``)."""
    found = final_answer(answer)
    if not found:
        return False
    wanted = final_answer(expected) or tidy(expected)
    if found == wanted:
        return True
    from math_verify import verify  # an optional package

    # math-verify's time limits are signals, which only the main thread can receive.
    limit = MATH_TIMEOUT_S if threading.current_thread() is threading.main_thread() else None
    return bool(verify(_parsed(wanted, limit), _parsed(found, limit), timeout_seconds=limit))


@lru_cache(maxsize=4096)
def _parsed(expression: str, limit_s: int | None) -> Any:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    return parse(
        f"${expression}$",
        extraction_config=[LatexExtractionConfig(), ExprExtractionConfig()],
        parsing_timeout=limit_s,
    )


def reasoning_gym(answer: str, expected: str) -> bool:
    """The row's task in ``reasoning_gym`` gives the answer its full score."""
    from reasoning_gym import get_score_answer_fn  # an optional package

    entry = json.loads(expected)
    found = tagged_answer(answer)
    score = get_score_answer_fn(entry["metadata"]["source_dataset"])
    return bool(score((strip_thinking(answer) if found is None else found).strip(), entry) == 1.0)


GRADERS: Mapping[str, Grader] = {
    "exact": exact,
    "exact_casefold": exact_casefold,
    "contains": contains,
    "answer_tag": answer_tag,
    "math": math,
    "reasoning_gym": reasoning_gym,
}
EXTRAS = {"math": ("math_verify", "math"), "reasoning_gym": ("reasoning_gym", "reasoning")}
"""Grader -> (package that it needs, extra of opcd that installs the package)."""

NAMES = (*GRADERS, "regex:PATTERN", "package.module:attribute")


def make_grader(spec: str) -> Grader:
    """Return the grader named by `spec`.

    ``regex:PATTERN`` searches the model's answer; the pattern's first group, or the whole match if it has no group,
    must equal the expected answer. ``package.module:attribute`` is a function ``(answer, expected) -> bool``. Raises
    ConfigError, with all valid names, for an unknown grader, and for a missing package.
    """
    if spec in GRADERS:
        package, extra = EXTRAS.get(spec, (None, None))
        if package is not None and find_spec(package) is None:
            raise ConfigError(f"eval.grader `{spec}` needs the `{extra}` extra: pip install 'opcd[{extra}]'")
        return GRADERS[spec]
    kind, colon, rest = spec.partition(":")
    if kind == "regex" and colon:
        return _regex(spec, rest)
    if colon:
        function = _imported(spec, kind, rest)
        return lambda answer, expected: bool(function(answer, expected))
    raise ConfigError(f"bad value eval.grader={spec!r}: valid are {', '.join(NAMES)}")


def _imported(spec: str, module: str, attribute: str) -> Callable[[str, str], float]:
    try:
        function: Any = importlib.import_module(module)
        for name in attribute.split("."):
            function = getattr(function, name)
        inspect.signature(function).bind("answer", "expected")
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ConfigError(
            f"bad value eval.grader={spec!r}: {error}; expected package.module:attribute of a function "
            f"(answer, expected) -> bool, or one of {', '.join(NAMES[:-1])}"
        ) from error
    return cast(Callable[[str, str], float], function)


def make_reward(spec: str) -> Callable[[str, str], float]:
    """Return a function (answer, expected answer) -> reward: a grader's verdict as 1 or 0, or the number that an
    imported function returns. Raises ConfigError as `make_grader`.
    """
    found = _imported(spec, *spec.split(":", 1)) if _is_import(spec) else make_grader(spec)
    return lambda answer, expected: float(found(answer, expected))


def _is_import(spec: str) -> bool:
    kind, colon, _ = spec.partition(":")
    return bool(colon) and kind != "regex"


def _regex(spec: str, pattern: str) -> Grader:
    try:
        compiled = regex.compile(pattern, regex.DOTALL)
    except regex.error as error:
        raise ConfigError(f"bad value eval.grader={spec!r}: {error}") from error

    def grade(answer: str, expected: str) -> bool:
        try:
            match = compiled.search(answer, timeout=REGEX_TIMEOUT_S)
        except TimeoutError:
            log.warning(
                "eval.grader %s: no match within %g s in an answer of %d characters, which counts as wrong: nested "
                "repetitions, as in (a+ ?)+, try every way to divide the text", spec, REGEX_TIMEOUT_S, len(answer)
            )  # fmt: skip
            return False
        if match is None:
            return False
        found = match.group(1) if compiled.groups else match.group(0)
        return found is not None and exact(found, expected)

    return grade
