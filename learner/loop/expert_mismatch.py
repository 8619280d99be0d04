"""How often engine and learner choose other experts for the same tokens, layer by layer. Pure.

A small difference of hidden states, from rounding, moves a token to another expert where two experts score alike. The
figure is no gate: such a choice changes a log-prob by little, and `learner.loop.parity` bounds that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Choices = NDArray[np.integer[Any]]


def expert_mismatch(engine: Sequence[Choices], learner: Sequence[Mapping[int, Choices]]) -> dict[str, float]:
    """Return, by metric, the share of the learner's choices that the engine did not make, over all tokens of a layer.

    `engine` has one ``[T, layers, k]`` array per sequence, of all layers of the model; `learner` maps the layers with
    experts to ``[T, k]``. The order of a token's experts does not count.
    """
    return {
        f"expert_mismatch/layer_{layer}": float(
            np.mean(
                [
                    expert not in there
                    for one, other in zip(engine, learner, strict=True)
                    for there, here in zip(one[:, layer], other[layer], strict=True)
                    for expert in here
                ]
            )
        )
        for layer in sorted(learner[0])
    }
