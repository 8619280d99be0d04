"""New weights into a teacher that follows its student: every version as it is (`live`) or averaged (`ema`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from common.weight_sync.collective import SyncError


class LiveWeights:
    """The parameters of a model in place, by checkpoint name (tied ones once).

    `decay` None copies every version. Otherwise the parameters are the average
    ``a_v = decay * a_(v-1) + (1 - decay) * w_v`` with ``a_0 = w_0``, kept in float32 whatever the model's dtype.
    """

    def __init__(self, model: Any, decay: float | None) -> None:
        self._parameters: dict[str, Tensor] = {name: p.detach() for name, p in model.named_parameters()}
        self._decay = decay
        self._average: dict[str, Tensor] = {}
        if decay is not None:
            self._average = {name: p if p.dtype == torch.float32 else p.float() for name, p in self._parameters.items()}

    @torch.no_grad()
    def load(self, tensors: Iterable[tuple[str, Tensor]], *, again: bool = False) -> None:
        """Take one version. Raises SyncError where `tensors` are not exactly the model's; then it holds a mixture, and
        must not be used any more.

        `again`: a version that was taken before, sent once more for somebody else's sake; an average stays as it is.
        """
        missing = set(self._parameters)
        for name, tensor in tensors:
            if name not in self._parameters:
                raise SyncError(f"the teacher's model has no parameter {name}: it is not the student's model")
            if name not in missing:
                raise SyncError(f"parameter {name} came twice")
            missing.remove(name)
            own = self._parameters[name]
            if own.shape != tensor.shape:
                raise SyncError(f"parameter {name} is {tuple(tensor.shape)}, the teacher's is {tuple(own.shape)}")
            if self._decay is None:
                own.copy_(tensor)
            elif not again:
                average = self._average[name]
                average.lerp_(tensor.to(average), 1 - self._decay)
                if average is not own:
                    own.copy_(average)
        if missing:
            raise SyncError(f"{len(missing)} parameters did not come, the first is {min(missing)}")

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs: the average. Empty where every version is copied: the learner sends it again."""
        return dict(self._average)

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from `state`."""
        for name, average in self._average.items():
            average.copy_(state[name])
            if average is not self._parameters[name]:
                self._parameters[name].copy_(average)
