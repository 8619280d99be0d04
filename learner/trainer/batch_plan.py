"""Splits sequences into micro-batches by their lengths. Pure: the driver and the ranks use the same plans."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Plan = Callable[[Sequence[int], int], list[list[int]]]
"""(lengths, tokens of a micro-batch) -> indices of each micro-batch's sequences."""


def plan_padded(lengths: Sequence[int], budget_tokens: int) -> list[list[int]]:
    """Split indices into micro-batches of at most `budget_tokens` tokens, padding included; longest first.

    A sequence longer than the budget forms a micro-batch alone. Equal lengths keep their order, so the plan is a
    function of its input.
    """
    batches: list[list[int]] = []
    for index in _longest_first(lengths):
        # The first of a batch is its longest, so the padded size is known when it opens.
        if not batches or lengths[batches[-1][0]] * (len(batches[-1]) + 1) > budget_tokens:
            batches.append([])
        batches[-1].append(index)
    return batches


def plan_packed(lengths: Sequence[int], budget_tokens: int) -> list[list[int]]:
    """Split indices into micro-batches of at most `budget_tokens` tokens, without padding.

    First fit, longest first: at most 11/9 of the fewest possible micro-batches, plus one.
    """
    batches: list[list[int]] = []
    free_tokens: list[int] = []
    for index in _longest_first(lengths):
        slot = next((i for i, free in enumerate(free_tokens) if free >= lengths[index]), None)
        if slot is None:
            slot = len(batches)
            batches.append([])
            free_tokens.append(budget_tokens)
        batches[slot].append(index)
        free_tokens[slot] -= lengths[index]
    return batches


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda index: -lengths[index])
