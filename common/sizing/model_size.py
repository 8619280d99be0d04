"""Sizes of a model, read from its config.json and the headers of its safetensors files. Loads no weights."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config.base import ConfigError
from common.config.training import LoraConfig

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
MAX_HEADER_BYTES = 100_000_000
"""Upper bound of the safetensors format for a header."""


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Numbers of a decoder; widths and counts are elements, not bytes."""

    parameters: int
    """Each tied weight counts once."""
    largest: int
    """Elements of the largest parameter."""
    vocabulary: int
    layers: int
    hidden: int
    query: int
    """Width of all query heads together."""
    key_value: int
    """Width of all key heads together, or of all value heads."""
    inner: int
    """Width of the feed-forward layer; with experts, of those that a token takes."""
    max_tokens: int
    """The model's own limit for a sequence."""
    linears: tuple[tuple[str, int], ...] = ()
    """Name of each linear layer except the output layer, and inputs plus outputs: what an adapter of rank 1 has."""

    def trained(self, lora: LoraConfig | None) -> int:
        """Parameters that the optimiser updates: all, or the adapters."""
        if lora is None:
            return self.parameters
        every = "all-linear" in lora.target_modules
        return lora.rank * sum(size for name, size in self.linears if every or name in lora.target_modules)

    def context_bytes(self, tokens: int, element_bytes: int) -> int:
        """Keys and values of `tokens` tokens, all layers."""
        return tokens * 2 * self.layers * self.key_value * element_bytes


def read_model_size(model: str) -> ModelSize | None:
    """Sizes of a local folder or a hub model in the local cache; None if neither has config.json and safetensors files.

    Raises ConfigError for a file that cannot be read.
    """
    folder = _folder(model)
    if folder is None:
        return None
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        shapes = {name: shape for path in _weight_files(folder) for name, shape in _header(path)}
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise ConfigError(f"{folder}: the sizes of the model cannot be read: {error}") from error
    if not shapes:
        return None
    return size_of(config, shapes)


def size_of(config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> ModelSize | None:
    """Sizes from config.json and the shape of every tensor; None for a configuration without the usual names."""
    text = {**config, **(config.get("text_config") or {})}
    if text.get("tie_word_embeddings", config.get("tie_word_embeddings")):
        shapes = {name: shape for name, shape in shapes.items() if not name.endswith("lm_head.weight")}
    try:
        hidden = _first(text, "hidden_size", "n_embd", "d_model")
        layers = _first(text, "num_hidden_layers", "n_layer", "num_layers")
        heads = _first(text, "num_attention_heads", "n_head", "num_heads")
        vocabulary = int(text["vocab_size"])
        max_tokens = _first(text, "max_position_embeddings", "n_positions", "max_seq_len")
    except KeyError:
        return None
    head = text.get("head_dim") or hidden // heads
    counts = {name: math.prod(shape) for name, shape in shapes.items()}
    return ModelSize(
        parameters=sum(counts.values()),
        largest=max(counts.values()),
        vocabulary=vocabulary,
        layers=layers,
        hidden=hidden,
        query=heads * head,
        key_value=(text.get("num_key_value_heads") or heads) * head,
        inner=_inner(text, hidden),
        max_tokens=max_tokens,
        linears=tuple(_linears(shapes)),
    )


def _inner(text: dict[str, Any], hidden: int) -> int:
    experts, width = text.get("num_experts_per_tok"), text.get("moe_intermediate_size")
    dense = text.get("intermediate_size") or text.get("n_inner") or 4 * hidden
    return int(experts * (width or dense) if experts else dense)


def _linears(shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, int]]:
    for name, shape in shapes.items():
        *path, kind = name.split(".")
        if kind == "weight" and len(shape) == 2 and path[-1] != "lm_head" and "embed" not in path[-1]:
            yield path[-1], sum(shape)


def _first(values: dict[str, Any], *names: str) -> int:
    for name in names:
        if values.get(name) is not None:
            return int(values[name])
    raise KeyError(names[0])


def _folder(model: str) -> Path | None:
    folder = Path(model)
    if (folder / "config.json").is_file():
        return folder
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(model, "config.json")
    except HFValidationError:  # a path
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def _weight_files(folder: Path) -> Iterable[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / name for name in sorted(set(names))]
    single = folder / "model.safetensors"
    return [single] if single.is_file() else []


def _header(path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each float tensor of a safetensors file."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"{path.name} is no safetensors file")
        header = json.loads(file.read(length))
    for name, entry in header.items():
        if name != "__metadata__" and entry["dtype"] in FLOATS:
            yield name, tuple(entry["shape"])
