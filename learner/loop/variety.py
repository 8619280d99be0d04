"""The warning that the student has collapsed onto one answer: it gives the same one to most prompts. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

COMMONEST = "rollout/commonest_answer"
"""Metric: the largest share of a step's prompts with one and the same answer."""
FIRST_STEPS = 3
"""Steps whose median says how alike this task's answers are to begin with."""
PATIENCE_STEPS = 3
RISE = 0.3
"""Growth of the share that is reported. Answers of a few kinds (yes and no, letters) are alike from the start."""
MIN_PROMPTS = 8
"""Fewest prompts of a step that tell."""


def commonest_answer(prompts_by_answer: Mapping[int, set[str]]) -> float | None:
    """Share of the prompts that got the answer which most prompts got; None below `MIN_PROMPTS` prompts."""
    prompts = set().union(*prompts_by_answer.values())
    if len(prompts) < MIN_PROMPTS:
        return None
    return max(map(len, prompts_by_answer.values())) / len(prompts)


class Variety:
    """Warns once in a run."""

    def __init__(self) -> None:
        self._first: list[float] = []
        self._steps = 0
        self._warned = False

    def observe(self, share: float | None) -> str | None:
        """Return the warning in the step that exhausts the patience.

        `share` is the step's largest share of prompts with one answer; None: too few prompts to tell.
        """
        if share is None:
            return None
        if len(self._first) < FIRST_STEPS:
            self._first.append(share)
            return None
        usual = statistics.median(self._first)
        self._steps = self._steps + 1 if share > usual + RISE else 0
        if self._warned or self._steps < PATIENCE_STEPS:
            return None
        self._warned = True
        return (
            f"the student gives one and the same answer to {share:.0%} of the step's prompts, at the start to "
            f"{usual:.0%}: if the prompts do not all ask for it, it has collapsed; look at the samples, lower "
            "learner.lr, raise rollout.batch_size, or mix in the teacher's answers (rollout.mix)"
        )
