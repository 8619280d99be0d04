"""Rows of each step's batch: of one set, or of several by share. A function of seed and step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from common.data.rows import rows_from

_STREAM = 0x736574
"""Tells these random numbers from others of the same seed and step."""


class RowOrder:
    """Deals out the rows of several sets, which lie one after the other, each in its own seeded order.

    Every step has each set's share of the batch, rounded up or down at random so that it is exact on average
    (systematic sampling). A set's rows come epoch after epoch, as those of a single set do.
    """

    def __init__(self, sizes: Sequence[int], shares: Sequence[float], *, batch_size: int, seed: int) -> None:
        """`sizes` are the rows of each set, `shares` their parts of a batch, which add up to 1."""
        self._sizes = sizes
        self._bounds = np.cumsum([0.0, *shares[:-1], 1.0 - sum(shares[:-1])])
        self._batch_size = batch_size
        self._seed = seed
        self._before: list[NDArray[np.int64]] = [np.zeros(len(sizes), dtype=np.int64)]
        """Rows of each set in all steps before this one."""

    def __call__(self, step: int) -> list[tuple[int, int]]:
        """(index among the rows of all sets, index of the set) at each position of the step's batch."""
        while len(self._before) <= step:
            self._before.append(self._before[-1] + self._counts(len(self._before) - 1))
        picked: list[tuple[int, int]] = []
        offset = 0
        for part, (size, start, count) in enumerate(
            zip(self._sizes, self._before[step], self._counts(step), strict=True)
        ):
            rows = rows_from(int(start), int(count), rows=size, seed=self._seed)
            picked += ((offset + row, part) for row in rows)
            offset += size
        if len(self._sizes) == 1:
            return picked
        return [picked[index] for index in self._rng(step, 1).permutation(len(picked))]

    def _counts(self, step: int) -> NDArray[np.int64]:
        """Rows of each set in a step."""
        slots = (np.arange(self._batch_size) + self._rng(step, 0).random()) / self._batch_size
        return np.diff(np.searchsorted(slots, self._bounds[1:-1]), prepend=0, append=self._batch_size)

    def _rng(self, step: int, use: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, step, _STREAM, use])
