"""Proof that a sync wrote every parameter of a vLLM model, on every path that its loaders take.

During vLLM's layerwise reload parameters are placeholders on the ``meta`` device. Their weight loaders run twice: on
the placeholder, to count elements (``get_numel_loaded``), and on the real weight once the layer is complete. If no
weight of a layer arrives, vLLM warns at most and keeps the old ones. What a model copies into a parameter by itself,
without the parameter's weight loader, goes into the placeholder and is lost. Both leave the count below the
parameter's size, so the proof compares the two. It reads no weights and costs one look-up per loader call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from common.weight_sync.collective import SyncError


@dataclass
class _Parameter:
    """A parameter to write, and the number of its elements that were written.

    `kernel` is the storage that the model computes with; tied parameters share it. `tensor` is the placeholder. It
    stays referenced, so that no other tensor gets its address.
    """

    name: str
    tensor: Tensor
    required: int
    kernel: int
    written: int = 0


class ArrivalProof:
    """Counts what one sync writes; create it after ``initialize_layerwise_reload``."""

    def __init__(self, model: nn.Module) -> None:
        self._model = type(model).__name__
        self._parameters = {_storage(one.tensor): one for one in _parameters(model)}

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count the calls of weight loaders inside this scope."""
        from vllm.model_executor.model_loader.reload import layerwise

        original = layerwise.get_numel_loaded

        def counted(loader: Any, call: Any) -> Any:
            elements, result = original(loader, call)
            parameter = self._parameters.get(_storage(call.arguments["param"]))
            if parameter is not None:
                parameter.written += elements
            return elements, result

        layerwise.get_numel_loaded = counted
        try:
            yield
        finally:
            layerwise.get_numel_loaded = original

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
            yield _Parameter(path, parameter, required, _storage(kernel.get(name, parameter)))


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


# --- copies that a CPU engine computes with --------------------------------------------------------------------------


class PackedCopies:
    """The packed weights of a CPU engine's layers; create it before a sync loads anything."""

    def __init__(self, model: nn.Module) -> None:
        self._before = {
            name: (layer, layer.cpu_linear) for name, layer in model.named_modules() if hasattr(layer, "cpu_linear")
        }

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
