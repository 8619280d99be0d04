"""New weights into a model on a CPU, whose linear layers keep a packed copy of their weight instead of it.

vLLM's layerwise reload loads any model, quantised or cut over workers, at the price of loading each tensor twice (once
onto the meta device, to count). A model of plain layers in one piece needs no more than this: fill a layer's weight,
have vLLM pack it on a thread beside, let it go.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from common.weight_sync.collective import SyncError

if TYPE_CHECKING:
    from collections.abc import Callable


class Repacking:
    """Updates of one model: `begin`, then ``model.load_weights``, then `finish`, or `give_up`."""

    def __init__(self, model: nn.Module) -> None:
        self._packed: dict[Any, str] = {layer: name for name, layer in model.named_modules() if _is_packed(layer)}
        self._filled: dict[Any, int] = {}
        """Elements that were loaded of each layer whose weight is not full yet."""
        self._packing: list[Future[None]] = []
        # One thread that packs with one: torch's pool would spin on the cores that load and receive.
        self._pool = ThreadPoolExecutor(1, "repack", lambda: torch._C.set_num_threads(1))

    @staticmethod
    def fits(model: nn.Module, workers: int) -> bool:
        """Whether each parameter is what its checkpoint's loader fills, packed at the most; where in doubt, False."""
        return workers == 1 and all(map(_is_plain, model.modules()))

    def begin(self) -> None:
        """Give the packed layers a weight to be filled. They go on answering with the packed one until it is full."""
        self._filled = dict.fromkeys(self._packed, 0)
        for layer in self._packed:
            weight = _blank(layer)
            weight.weight_loader = self._counting(layer, weight.weight_loader)
            layer.weight = weight

    def finish(self) -> None:
        """Wait until all are packed. Raises SyncError for layers whose weight was not loaded, or not all of it."""
        left = [
            f"{self._packed[layer]} ({filled:,} of {layer.weight.numel():,} elements)"
            for layer, filled in self._filled.items()
        ]
        for packed in self.give_up():
            packed.result()
        if left:
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            raise SyncError(f"a sync left layers without all of their weight: {', '.join(left[:3])}{more}")

    def give_up(self) -> list[Future[None]]:
        """Leave the layers that are not full as they were. The model then holds parts of two versions.

        Returns the packings of the others, ended.
        """
        ended, self._packing = self._packing, []
        wait(ended)
        for layer in self._filled:
            layer.weight = nn.Parameter(layer.weight.new_empty(0), requires_grad=False)
        self._filled = {}
        return ended

    def _counting(self, layer: Any, load: Callable[..., Any]) -> Callable[..., Any]:
        """A weight loader that has the layer packed when it is full."""

        def load_and_count(weight: Tensor, loaded: Tensor, *arguments: Any, **named: Any) -> Any:
            result = load(weight, loaded, *arguments, **named)
            self._filled[layer] += loaded.numel()
            if self._filled[layer] == weight.numel():
                del self._filled[layer]
                pack = layer.quant_method.process_weights_after_loading
                self._packing.append(self._pool.submit(pack, layer))
            return result

        return load_and_count


def repack_output_layer(model: nn.Module) -> None:
    """Pack the output layer again.

    It keeps its weight beside the packed copy, which would go on answering with the old one. A tied one is loaded as
    the embedding. vLLM packs that, too: it shares the copy, which nothing else uses.
    """
    head: Any = getattr(model, "lm_head", None)
    weight = getattr(head, "weight", None)
    if weight is None or not hasattr(head, "quant_method"):
        return
    head.quant_method.process_weights_after_loading(head)
    for layer in model.modules():
        if getattr(layer, "weight", None) is weight and hasattr(layer, "cpu_linear"):
            layer.cpu_linear = head.cpu_linear


def _is_packed(layer: Any) -> bool:
    """A linear layer that let its weight go."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    return type(getattr(layer, "quant_method", None)) is UnquantizedLinearMethod and not layer.weight.numel()


def _is_plain(layer: Any) -> bool:
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    method = getattr(layer, "quant_method", None)
    if method is not None and type(method) not in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod):
        return False
    if hasattr(layer, "process_weights_after_loading") and type(layer) is not Attention:
        return False
    loaded, _ = get_layerwise_info(layer).restore_metadata
    for name, before in loaded.items():
        if method is not None and name == "weight" and before.ndim != 2:
            return False  # a convolution's is packed in place
        if name == "weight" and _is_packed(layer):
            continue
        now = getattr(layer, name, None)
        if now is None or now.shape != before.shape or now.dtype != before.dtype:
            return False
    return True


def _blank(layer: nn.Module) -> Any:
    """The layer's weight as it was before loading, with its loader, its elements undefined."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
    from vllm.model_executor.model_loader.reload.meta import materialize_meta_tensor, to_meta_tensor
    from vllm.model_executor.model_loader.reload.sanitize import restore_layer_refs

    info = get_layerwise_info(layer)
    with info.restore_device:
        blank = materialize_meta_tensor(to_meta_tensor(info.restore_metadata[0]["weight"]))
    return restore_layer_refs(blank, layer)
