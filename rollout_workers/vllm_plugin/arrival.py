"""Proof that a sync wrote every parameter of a vLLM model, on every path that its loaders take.

During vLLM's layerwise reload parameters are placeholders on the ``meta`` device. Their weight loaders run twice: on
the placeholder, to count elements (``get_numel_loaded``), and on the real weight once the layer is complete. If no
weight of a layer arrives, vLLM warns at most and keeps the old ones. What a model copies into a parameter by itself,
without the parameter's weight loader, goes into the placeholder and is lost: it is copied into the real weight here,
if nothing else is made of that weight. Whatever is left leaves the count below the parameter's size, so the proof
compares the two. It reads no weights and costs one look-up per loader call and copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from common.weight_sync.collective import SyncError


@dataclass
class _Parameter:
    """A parameter to write, and the number of its elements that were written.

    `kernel` is the storage that the model computes with; tied parameters share it. `tensor` is the placeholder. It
    stays referenced, so that no other tensor gets its address. `real` is the weight that the model computes with, None
    if its layer makes something else of what is loaded.
    """

    name: str
    tensor: Tensor
    required: int
    kernel: int
    real: Tensor | None
    written: int = 0

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Repeat a copy to `target`, a view of the placeholder, on the real weight."""
        if self.real is not None and self.real.shape == self.tensor.shape:
            view = self.real.data.as_strided(target.shape, target.stride(), target.storage_offset())
            view.copy_(source)
            self.written += view.numel()


class ArrivalProof:
    """Counts what one sync writes; create it after ``initialize_layerwise_reload``."""

    def __init__(self, model: nn.Module) -> None:
        self._model = type(model).__name__
        self._parameters = {_storage(one.tensor): one for one in _parameters(model)}
        self._in_loader = False

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what weight loaders write inside this scope; repeat copies outside of them on the real weights."""
        from vllm.model_executor.model_loader.reload import layerwise

        original = layerwise.get_numel_loaded

        def counted(loader: Any, call: Any) -> Any:
            self._in_loader = True
            try:
                elements, result = original(loader, call)
            finally:
                self._in_loader = False
            parameter = self._parameters.get(_storage(call.arguments["param"]))
            if parameter is not None:
                parameter.written += elements
            return elements, result

        layerwise.get_numel_loaded = counted
        try:
            with _Copies(self._copied):
                yield
        finally:
            layerwise.get_numel_loaded = original

    def _copied(self, target: Tensor, source: Tensor) -> None:
        if not self._in_loader and target.is_meta and (parameter := self._parameters.get(_storage(target))):
            parameter.copy(target, source)

    def check(self) -> None:
        """Raise SyncError if a parameter was not written whole; of tied parameters, one must be."""
        complete = {one.kernel for one in self._parameters.values() if one.written >= one.required}
        missing = [one for one in self._parameters.values() if one.kernel not in complete]
        if missing:
            shown = ", ".join(f"{one.name} ({one.written:,} of {one.required:,} elements)" for one in missing[:3])
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise SyncError(
                f"the sync did not write all parameters of {self._model}: {shown}{more} would keep old weights; the "
                "learner does not send them, or this version of vLLM cannot reload them: train another model"
            )


class _Copies(TorchDispatchMode):
    """Calls `notice` with target and source of each ``copy_`` inside its scope."""

    def __init__(self, notice: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        self._notice = notice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            self._notice(args[0], args[1])
        return func(*args, **(kwargs or {}))


def _parameters(model: nn.Module) -> Iterator[_Parameter]:
    """Yield the parameters of all layers as they are during a reload, except those that vLLM never reloads.

    The latter (expert maps, the correction bias of routers) are no parameters of the learner's model: training leaves
    them as the engine loaded them.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
    from vllm.model_executor.model_loader.reload.meta import SKIP_LOAD_TENSORS
    from vllm.model_executor.model_loader.reload.utils import get_tensor_load_numel

    for prefix, layer in model.named_modules():
        kernel_tensors = get_layerwise_info(layer).kernel_tensors
        kernel = kernel_tensors[0] if kernel_tensors is not None else {}
        for name, parameter in layer._parameters.items():
            if parameter is None or name in SKIP_LOAD_TENSORS:
                continue
            required = get_tensor_load_numel(parameter)  # without the padding of experts
            if isinstance(layer, VocabParallelEmbedding) and getattr(parameter, "output_dim", None) == 0:
                rows = layer.shard_indices.num_org_elements  # without the padding of the vocabulary
                required = rows * (parameter.numel() // len(parameter))
            path = f"{prefix}.{name}" if prefix else name
            real = kernel.get(name, parameter)
            processed = hasattr(layer, "quant_method")
            yield _Parameter(path, parameter, required, _storage(real), None if processed else real)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
