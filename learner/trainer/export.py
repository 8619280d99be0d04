"""The trained weights under their checkpoint names: for a weight sync, and as a Hugging Face or peft folder."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from common.config.model import LoraConfig
from common.files import apply_umask
from common.models.checkpoint_layout import CheckpointUnit, checkpoint_units, other_modules
from common.weight_sync.manifest import TensorSpec
from learner.trainer.lora import Adapter, adapters_of, checkpoint_name, save_adapter
from learner.trainer.untrained import stored_bytes, untrained_tensors

Named = tuple[CheckpointUnit, nn.Parameter, Adapter | None]


class WeightView:
    """Names, shapes and gathered values of a model's trained tensors under their checkpoint names, embeddings last.

    A tied output layer appears once, and each adapter is merged into its weight. Shapes come from `full_shape`: under
    ZeRO-3 the shape of a parameter itself is empty.
    """

    def __init__(self, model: Any) -> None:
        """Raises ValueError for an architecture whose checkpoint cannot be made of its parameters."""
        self._model = model
        adapters = adapters_of(model)
        others = tuple(f"{name}." for name in other_modules(model))

        def held(names: Iterable[str]) -> dict[str, str]:
            """Names without adapters, by the module's name, of what belongs to the language model."""
            plain = {name: checkpoint_name(name) for name in names}
            return {name: own for name, own in plain.items() if own is not None and not own.startswith(others)}

        self._held = held(model.state_dict())
        parameters = dict(model.named_parameters())
        parameters = {own: parameters[name] for name, own in held(parameters).items()}
        self._buffers = {name: buffer for name, buffer in model.named_buffers() if name in self._held}
        placeholders = {
            name: torch.empty(full_shape(tensor), dtype=tensor.dtype, device="meta")
            for name, tensor in (parameters | self._buffers).items()
        }
        self._units = checkpoint_units(model, placeholders)
        self._named: list[Named] = [
            (self._units[name], parameter, adapters.get(name)) for name, parameter in parameters.items()
        ]
        # An engine loads one layer while the next ones travel, so the slowest tensors to send come last.
        ends = {id(layer.weight) for layer in (model.get_input_embeddings(), model.get_output_embeddings())}
        self._named.sort(key=lambda named: id(named[1]) in ends)
        self.specs = tuple(
            TensorSpec(name, str(parameter.dtype).removeprefix("torch."), shape)
            for unit, parameter, _ in self._named
            for name, shape in unit.shapes.items()
        )

    def gathered(self, group_bytes: int) -> Iterator[tuple[str, Tensor]]:
        """Yield every (name, tensor) in the order of `specs`; under ZeRO-3 a collective that all ranks must exhaust.

        Partitioned parameters are gathered in groups of at most `group_bytes` (a larger tensor is a group alone), and
        are whole only until the next group starts: copy a tensor to keep it longer.
        """
        for group in _groups(self._named, group_bytes):
            with _whole([one for _, weight, adapter in group for one in _parts(weight, adapter)]):
                for unit, weight, adapter in group:
                    whole = weight.detach() if adapter is None else adapter.merged(weight.detach())
                    yield from unit.split(self._model, whole)

    def untrained(self, source: str) -> dict[str, Path]:
        """Map each tensor of `source`, which the model was loaded from, that training leaves alone to its file."""
        return untrained_tensors(self._model, self._held.values(), source)

    def export(
        self,
        folder: Path,
        files: Mapping[str, bytes],
        lora: LoraConfig | None,
        base_model: str,
        untrained: Mapping[str, Path],
        *,
        write: bool,
        group_bytes: int,
        sample: bool = False,
    ) -> None:
        """Export the model with `files` (`exported_files`), or the adapter alone (``learner.lora.publish``).

        `untrained` tensors are copied from their files as they are.
        The folder is complete and read back, or absent. Every rank calls this; the rank with `write` writes. With
        `sample` one element of each tensor stands for it: a trial of everything but the size. Raises OSError or
        SafetensorError there on a failed write.
        """
        adapter = lora is not None and lora.publish == "adapter"
        state = {}
        for name, tensor in self._adapter_factors().items() if adapter else self.gathered(group_bytes):
            if write:
                state[name] = tensor.flatten()[:1].cpu().clone() if sample else _host_copy(tensor)
        if not write:
            return
        if lora is not None and adapter:
            _replace_folder(folder, lambda partial: save_adapter(partial, state, lora, base_model))
            return
        for name, buffer in self._buffers.items():
            state |= {key: value.cpu().clone() for key, value in self._units[name].split(self._model, buffer)}
        for name, path in untrained.items():
            with safe_open(path, "pt") as stored:
                state[name] = stored.get_tensor(name).flatten()[:1].clone() if sample else stored.get_tensor(name)
        _replace_folder(folder, lambda partial: save_model(partial, state, files))

    def export_bytes(self, lora: LoraConfig | None, untrained: Mapping[str, Path]) -> int:
        """Return the size of all tensors that `export` writes with these arguments."""
        if lora is not None and lora.publish == "adapter":
            return sum(math.prod(full_shape(factor)) * factor.itemsize for _, factor in self._factors())
        buffers = sum(buffer.nbytes for buffer in self._buffers.values())
        return sum(spec.nbytes for spec in self.specs) + buffers + stored_bytes(untrained)

    def _factors(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self._model.named_parameters() if checkpoint_name(name) is None]

    def _adapter_factors(self) -> dict[str, Tensor]:
        """Copy the adapters' parameters by name. A collective under ZeRO-3."""
        factors = self._factors()
        with _whole([parameter for _, parameter in factors]):
            return {name: parameter.detach().to("cpu", copy=True).contiguous() for name, parameter in factors}


def _replace_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write a temporary folder, then rename it to `folder`, so that `folder` is always complete."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        fill(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # half a model on a full disk helps no one
        raise
    apply_umask(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def save_model(folder: Path, state: Mapping[str, Tensor], files: Mapping[str, bytes]) -> None:
    """Write `files` and, as safetensors, `state`; read all of it back. Raises OSError or SafetensorError."""
    from huggingface_hub import save_torch_state_dict

    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    save_torch_state_dict(dict(state), folder, metadata={"format": "pt"})
    check_written(folder, state, files)


def check_written(folder: Path, state: Mapping[str, Tensor], files: Mapping[str, bytes]) -> None:
    """Raise OSError unless `folder` holds exactly these bytes."""
    left = dict(state)
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118, it is no mapping
                if name not in left or not _same_bytes(stored.get_tensor(name), left.pop(name)):
                    raise OSError(f"{shard}: {name} does not read back as it was written")
    if left:
        raise OSError(f"{folder}: {len(left)} tensors are missing, for example {min(left)}")
    for name, content in files.items():
        if (folder / name).read_bytes() != content:
            raise OSError(f"{folder / name} does not read back as it was written")


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    """True for equal bits: a NaN equals itself."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(*(tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, other)))


def _host_copy(tensor: Tensor) -> Tensor:
    """`tensor` in host memory, valid after the next group is gathered, in a storage of its own size.

    A writer of shards takes tensors in one storage for one tied tensor, and DeepSpeed may keep all of them in one.
    """
    lasting = tensor.device.type == "cpu" and not hasattr(tensor, "ds_id")
    if lasting and tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.to("cpu", copy=True).contiguous()


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Return the shape of the whole parameter, partitioned or not."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _groups(items: Sequence[Named], limit: int) -> Iterator[list[Named]]:
    group: list[Named] = []
    size = 0
    for item in items:
        nbytes = math.prod(full_shape(item[1])) * item[1].itemsize
        if group and size + nbytes > limit:
            yield group
            group, size = [], 0
        group.append(item)
        size += nbytes
    if group:
        yield group


def _parts(weight: nn.Parameter, adapter: Adapter | None) -> list[nn.Parameter]:
    return [weight] if adapter is None else [weight, adapter.a, adapter.b]


def _whole(parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=None)
