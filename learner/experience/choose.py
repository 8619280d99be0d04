"""Which contexts of a pool are distilled. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def at_random(ids: Sequence[str], count: int | None, seed: int) -> list[str]:
    """`count` of `ids` (None: all), in their order."""
    if count is None or count >= len(ids):
        return list(ids)
    picked = np.random.default_rng(seed).choice(len(ids), size=count, replace=False)
    return [ids[index] for index in sorted(picked)]


def best(accuracies: Mapping[str, float], count: int) -> list[str]:
    """The `count` ids of highest accuracy, best first; of equals the one that comes first in the mapping."""
    return sorted(accuracies, key=lambda one: -accuracies[one])[:count]
