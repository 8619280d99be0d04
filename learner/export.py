"""The weights under their checkpoint names: for a weight sync, and as a Hugging Face folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.weights import TensorSpec


class WeightView:
    """Names, shapes and (gathered) values of a model's parameters; a tied output layer appears once.

    `full_shape` knows partitioned parameters: under ZeRO-3 a parameter's own shape is empty.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._named: list[tuple[str, nn.Parameter]] = list(model.named_parameters())
        _check_names(model, [name for name, _ in self._named])
        self.specs = tuple(
            TensorSpec(name, str(parameter.dtype).removeprefix("torch."), full_shape(parameter))
            for name, parameter in self._named
        )

    def gathered(self, group_bytes: int) -> Iterator[tuple[str, Tensor]]:
        """Every (name, tensor) in the order of `specs`; a collective under ZeRO-3: every rank goes through all.

        Partitioned parameters are whole only until the next item of another group is asked for: groups hold at most
        `group_bytes` (a larger tensor is one by itself). Copy what must live longer.
        """
        for group in _groups(list(zip(self._named, self.specs, strict=True)), group_bytes):
            with _whole([parameter for (_, parameter), _ in group]):
                for (name, parameter), _ in group:
                    yield name, parameter.detach()

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
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        self._model.save_pretrained(partial, state_dict=state)
        tokenizer.save_pretrained(partial)
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


def _whole(parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=None)


def _check_names(model: Any, names: list[str]) -> None:
    """Refuse an architecture whose in-memory names differ from its checkpoint's: no engine would know them."""
    from transformers.core_model_loading import revert_weight_conversion

    if getattr(model, "_weight_conversions", None) is None:
        return
    stand_ins = {name: torch.empty(full_shape(p), device="meta") for name, p in model.named_parameters()}
    saved = set(revert_weight_conversion(model, stand_ins))
    if saved != set(names):
        odd = sorted(set(names) - saved)[:3]
        raise ValueError(
            f"{type(model).__name__} keeps its weights under other names than its checkpoint (for example {odd}); "
            "publishing it to an engine is not supported"
        )
