"""The warning that answers do not end within the limit of tokens."""

from __future__ import annotations

from learner.evaluation.held_out import MANY_CUT

PATIENCE_STEPS = 5
"""Steps in a row with many cut answers before the warning: a student without the context may first have to learn where
an answer ends."""


class CutAnswers:
    """Warns once in a run. Shorter runs are covered by the warnings of the evaluations."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._steps = 0
        self._warned = False

    def observe(self, share: float) -> str | None:
        """Return the warning in the step that exhausts the patience; `share` is the step's share of cut answers."""
        self._steps = self._steps + 1 if share > MANY_CUT else 0
        if self._warned or self._steps < PATIENCE_STEPS:
            return None
        self._warned = True
        return (
            f"{share:.0%} of the step's answers did not end within {self._max_tokens} tokens, and most did not in the "
            f"{PATIENCE_STEPS - 1} steps before: raise rollout.max_tokens, or set rollout.stop"
        )
