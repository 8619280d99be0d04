"""Weight updates of a teacher that follows its student: each version copied (`live`) or averaged (`ema`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from common.models.checkpoint_layout import checkpoint_units, other_modules
from common.weight_sync.collective import SyncError


class LiveWeights:
    """Updates a model's parameters in place, by checkpoint name (tied parameters once; vision towers never).

    `decay` None copies every version. Otherwise the parameters are the average
    ``a_v = decay * a_(v-1) + (1 - decay) * w_v`` with ``a_0 = w_0``, kept in float32 for any dtype of the model.
    """

    def __init__(self, model: Any, decay: float | None) -> None:
        others = tuple(f"{name}." for name in other_modules(model))
        self._model = model
        self._parameters: dict[str, Tensor] = {
            name: p.detach() for name, p in model.named_parameters() if not name.startswith(others)
        }
        units = checkpoint_units(model, {name: p.to("meta") for name, p in self._parameters.items()})
        self._units = {name: unit for unit in units.values() for name in unit.shapes}
        self._decay = decay
        self._average: dict[str, Tensor] = {}
        if decay is not None:
            self._average = {name: p if p.dtype == torch.float32 else p.float() for name, p in self._parameters.items()}

    @torch.no_grad()
    def load(self, tensors: Iterable[tuple[str, Tensor]], *, repeated: bool = False) -> None:
        """Load one version. Raises SyncError if `tensors` are not exactly the model's parameters; the model then holds
        a mixture of versions and is unusable.

        `repeated`: a version that was loaded before, sent again for another receiver; it leaves an average unchanged.
        """
        missing = set(self._units)
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors:
            if name not in self._units:
                raise SyncError(f"the teacher's model has no parameter {name}: it is not the student's model")
            if name not in missing:
                raise SyncError(f"parameter {name} arrived twice")
            missing.remove(name)
            unit = self._units[name]
            if tensor.shape != unit.shapes[name]:
                raise SyncError(f"parameter {name} is {tuple(tensor.shape)}, the teacher's is {unit.shapes[name]}")
            arrived = parts.setdefault(unit.name, {})
            arrived[name] = tensor
            if len(arrived) == len(unit.shapes):
                self._update(unit.name, unit.join(self._model, parts.pop(unit.name)), repeated=repeated)
        if missing:
            raise SyncError(f"{len(missing)} parameters did not arrive, the first is {min(missing)}")

    def _update(self, name: str, value: Tensor, *, repeated: bool) -> None:
        parameter = self._parameters[name]
        if self._decay is None:
            parameter.copy_(value)
        elif not repeated:
            average = self._average[name]
            average.lerp_(value.to(average), 1 - self._decay)
            if average is not parameter:
                parameter.copy_(average)

    def state(self) -> dict[str, Tensor]:
        """State for a checkpoint: the average, or the weights of a teacher that copies."""
        return dict(self._average or self._parameters)

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        """Restore `state`."""
        for name, kept in (self._average or self._parameters).items():
            kept.copy_(state[name])
            if kept is not self._parameters[name]:
                self._parameters[name].copy_(kept)
