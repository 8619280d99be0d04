"""Steps whose details a run writes: all of a short run, ever fewer of a long one, so that its files stay bounded."""

from __future__ import annotations

TOKEN_STEPS = 100
"""Steps up to which every one has its answers in ``tokens.jsonl``."""
TRACE_ANSWERS = 32_768
"""Answers up to which every step is in ``trace.json``: about 35 MB."""
MIN_TRACE_STEPS = 20
"""Every one of the first steps is in ``trace.json``, however many answers it has."""


def keeps_details(step: int, whole: int) -> bool:
    """True for each of the steps 1 to `whole`, each 2nd to twice `whole`, each 4th to four times `whole`, and so on.

    Each doubling adds half of `whole`: with 100, a run of 10,000 steps keeps 428. A function of the step alone, so a
    resumed run keeps the same ones.
    """
    return step % (1 << ((step - 1) // whole).bit_length()) == 0


def keeps_trace(step: int, answers: int) -> bool:
    """True for the steps of `answers` answers whose spans go to ``trace.json``."""
    return keeps_details(step, max(MIN_TRACE_STEPS, TRACE_ANSWERS // answers))
