"""A model's tensors as its checkpoint has them, by transformers' own conversion, reversed.

transformers 5 keeps some weights under other names than the checkpoint, or fused: the experts of a layer are one tensor
of the model and hundreds of the checkpoint. Engines and other tools know the checkpoint's names only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class CheckpointUnit:
    """A tensor of the model and the tensors of the checkpoint that it holds: one, or one for each expert.

    `shapes` are those of the checkpoint's tensors by name; all have the dtype of the model's.
    """

    name: str
    shapes: dict[str, tuple[int, ...]]
    converted: bool

    def split(self, model: Any, value: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield (checkpoint name, tensor) in the order of `shapes`, given the whole tensor of the model."""
        if not self.converted:
            yield next(iter(self.shapes)), value
            return
        from transformers.core_model_loading import revert_weight_conversion

        yield from revert_weight_conversion(model, {self.name: value}).items()

    def join(self, model: Any, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the tensor of `model`, loaded from a checkpoint, that the tensors of `shapes` make up."""
        if not self.converted:
            return tensors[next(iter(self.shapes))]
        from transformers.core_model_loading import rename_source_key

        renamings, converters = conversions(model)
        patterns = {name: rename_source_key(name, renamings, converters)[1] for name in self.shapes}
        (converter,) = (deepcopy(one) for one in converters if set(patterns.values()) <= set(one.source_patterns))
        for name, pattern in patterns.items():
            converter.add_tensor(self.name, name, pattern, tensors[name])
        (value,) = converter.convert(self.name, model=model, config=model.config).values()
        return value[0] if isinstance(value, list) else value


def conversions(model: Any) -> tuple[list[Any], list[Any]]:
    """Renamings and converters by which transformers loaded `model` from its checkpoint."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    used = getattr(model, "_weight_conversions", None) or []
    renamings = [one for one in used if isinstance(one, WeightRenaming)]
    return renamings, [one for one in used if isinstance(one, WeightConverter)]


def checkpoint_units(model: Any, placeholders: Mapping[str, Tensor]) -> dict[str, CheckpointUnit]:
    """Map each name of `placeholders` (tensors of `model` on the meta device) to its unit.

    Raises ValueError for an architecture of which one checkpoint tensor needs several tensors of the model.
    """
    from transformers.core_model_loading import revert_weight_conversion

    whole = revert_weight_conversion(model, dict(placeholders))
    own_name = {id(tensor): name for name, tensor in placeholders.items()}
    plain = {own_name[id(tensor)]: {name: tensor} for name, tensor in whole.items() if id(tensor) in own_name}
    units = {}
    for name, tensor in placeholders.items():
        held = plain.get(name) or revert_weight_conversion(model, {name: tensor})
        shapes = {target: tuple(value.shape) for target, value in held.items()}
        units[name] = CheckpointUnit(name, shapes, converted=name not in plain)
    alone = [item for unit in units.values() for item in unit.shapes.items()]
    if sorted(alone) != sorted((name, tuple(tensor.shape)) for name, tensor in whole.items()):
        raise ValueError(
            f"{type(model).__name__}: its checkpoint joins weights that transformers keeps apart, which cannot be "
            "published: train another model"
        )
    return units


def other_modules(model: Any) -> list[str]:
    """Names of the outermost modules outside the language model: towers and projectors; mostly none.

    They are not trained, not sent, and not used.
    """
    if model.config.get_text_config() is model.config:
        return []
    language = {
        id(module) for part in (model.get_decoder(), model.get_output_embeddings()) for module in part.modules()
    }
    others: list[str] = []
    for name, module in model.named_modules():
        inside = any(id(child) in language for child in module.modules())
        if not inside and not any(name.startswith(f"{outer}.") for outer in others):
            others.append(name)
    return others
