"""Packed weights of a CPU engine: copies in another layout, which a reload has to make anew."""

from __future__ import annotations

from torch import nn

from common.weight_sync.collective import SyncError


class PackedCopies:
    """The packed weights of a CPU engine's layers; create it before a sync loads anything."""

    def __init__(self, model: nn.Module) -> None:
        self._before = {
            name: (layer, layer.cpu_linear) for name, layer in model.named_modules() if hasattr(layer, "cpu_linear")
        }
        for layer in model.modules():
            # vLLM packs experts when it builds their kernel, and keeps a kernel that it has.
            if self._before and getattr(getattr(layer, "quant_method", None), "moe_kernel", None) is not None:
                layer.quant_method.moe_kernel = None  # type: ignore[union-attr]

    def renew(self) -> None:
        """Replace the copies that the reload left as they were: those of tied output layers.

        A layer that shares its weight with another one takes the other one's new copy. Raises SyncError if there is
        neither a new copy nor a weight to pack.
        """
        packed = {
            id(layer.weight): layer.cpu_linear for layer, old in self._before.values() if layer.cpu_linear is not old
        }
        for name, (layer, old) in self._before.items():
            if layer.cpu_linear is not old or old is nn.functional.linear:
                continue
            if id(layer.weight) in packed:
                layer.cpu_linear = packed[id(layer.weight)]
            elif layer.weight.numel() and hasattr(layer, "quant_method"):
                layer.quant_method.process_weights_after_loading(layer)
            if layer.cpu_linear is old:
                raise SyncError(f"the sync did not renew the packed weights of {name}: it would compute with old ones")
