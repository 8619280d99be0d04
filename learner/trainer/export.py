"""The weights under their checkpoint names: for a weight sync, and as a Hugging Face folder."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.weight_sync.manifest import TensorSpec
from learner.trainer.lora import Adapter, adapters_of, checkpoint_name


class WeightView:
    """Names, shapes and (gathered) values of a model's parameters, the largest (embeddings) last; a tied output layer
    appears once, and adapters are merged into the weights beside which they stand.

    `full_shape` knows partitioned parameters: under ZeRO-3 a parameter's own shape is empty.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        adapters = adapters_of(model)
        self._named: list[tuple[str, nn.Parameter, Adapter | None]] = [
            (name, parameter, adapters.get(name))
            for own_name, parameter in model.named_parameters()
            if (name := checkpoint_name(own_name)) is not None
        ]
        # An engine takes in a layer while the next ones travel: what would be waited for longest comes last.
        sizes = {name: math.prod(full_shape(parameter)) for name, parameter, _ in self._named}
        self._named.sort(key=lambda named: sizes[named[0]] == max(sizes.values()))
        _check_names(model, {name: parameter for name, parameter, _ in self._named})
        self.specs = tuple(
            TensorSpec(name, str(parameter.dtype).removeprefix("torch."), full_shape(parameter))
            for name, parameter, _ in self._named
        )

    def gathered(self, group_bytes: int) -> Iterator[tuple[str, Tensor]]:
        """Every (name, tensor) in the order of `specs`; a collective under ZeRO-3: every rank goes through all.

        Partitioned parameters are whole only until the next item of another group is asked for: groups hold at most
        `group_bytes` (a larger tensor is one by itself). Copy what must live longer.
        """
        for group in _groups(list(zip(self._named, self.specs, strict=True)), group_bytes):
            with _whole([one for (_, weight, adapter), _ in group for one in _parts(weight, adapter)]):
                for (name, weight, adapter), _ in group:
                    yield name, weight.detach() if adapter is None else adapter.merged(weight.detach())

    def adapter_factors(self) -> dict[str, Tensor]:
        """Copies of the adapters' own parameters by name; empty without LoRA. A collective under ZeRO-3."""
        factors = [(name, p) for name, p in self._model.named_parameters() if checkpoint_name(name) is None]
        with _whole([parameter for _, parameter in factors]):
            return {name: parameter.detach().to("cpu", copy=True).contiguous() for name, parameter in factors}

    def save(self, folder: Path, tokenizer: Any, *, write: bool, group_bytes: int) -> None:
        """A Hugging Face folder with the tokenizer, complete or absent; every rank calls it, one has `write`."""
        state = {}
        for name, tensor in self.gathered(group_bytes):
            if write:
                state[name] = tensor.to("cpu", copy=tensor.device.type != "cpu" or hasattr(tensor, "ds_id"))
        if not write:
            return
        for name, buffer in self._model.named_buffers():
            if name in self._model.state_dict():
                state[name] = buffer.detach().cpu()

        def fill(partial: Path) -> None:
            self._model.save_pretrained(partial, state_dict=state)
            tokenizer.save_pretrained(partial)

        replace_folder(folder, fill)


def replace_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Have `fill` write a new folder beside, then put it in the place of `folder`: complete, or as it was."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    fill(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of the whole parameter, partitioned or not."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _groups(items: Sequence[tuple[Any, TensorSpec]], limit: int) -> Iterator[list[tuple[Any, TensorSpec]]]:
    group: list[tuple[Any, TensorSpec]] = []
    size = 0
    for item in items:
        if group and size + item[1].nbytes > limit:
            yield group
            group, size = [], 0
        group.append(item)
        size += item[1].nbytes
    if group:
        yield group


def _parts(weight: nn.Parameter, adapter: Adapter | None) -> list[nn.Parameter]:
    return [weight] if adapter is None else [weight, adapter.a, adapter.b]


def _whole(parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=None)


def _check_names(model: Any, named: Mapping[str, nn.Parameter]) -> None:
    """Refuse an architecture whose in-memory names differ from its checkpoint's: no engine would know them."""
    from transformers.core_model_loading import revert_weight_conversion

    if getattr(model, "_weight_conversions", None) is None:
        return
    stand_ins = {name: torch.empty(full_shape(p), device="meta") for name, p in named.items()}
    saved = set(revert_weight_conversion(model, stand_ins))
    if saved != set(named):
        odd = sorted(set(named) - saved)[:3]
        raise ValueError(
            f"{type(model).__name__} keeps its weights under other names than its checkpoint (for example {odd}); "
            "publishing it to an engine is not supported"
        )
