"""Parts of a checkpoint that training leaves alone: vision and audio towers, layers for multi-token prediction.

They are frozen, not sent to engines, and copied into every export as they are in the source.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.models.checkpoint_layout import conversions, other_modules

CHECKPOINT = "*.safetensors"


def freeze_untrained(model: nn.Module) -> None:
    """Exclude from training `other_modules` and what the model's class fixes: without gradients, weight decay would
    still shrink them.

    transformers makes every parameter that it loads trainable, so a model of the class on the meta device is asked.
    Such parameters are the correction biases of routers (ERNIE 4.5 MoE): they stay as they are.
    """
    for name in other_modules(model):
        model.get_submodule(name).requires_grad_(requires_grad=False)
    with torch.device("meta"):
        built: nn.Module = type(model)(model.config)
    for name, parameter in built.named_parameters():
        if not parameter.requires_grad:
            model.get_parameter(name).requires_grad = False


def untrained_tensors(model: Any, held: Iterable[str], source: str) -> dict[str, Path]:
    """Map the name of each tensor in the safetensors files of `source` that is not in `held` to its file.

    `held` are names of tensors of `model`, which was loaded from `source`, a folder or a hub name in the cache.
    """
    from safetensors import safe_open
    from transformers.core_model_loading import rename_source_key

    renamings, converters = conversions(model)
    ours = dict.fromkeys(held, True)
    found = {}
    for path in sorted(_folder(source).glob(CHECKPOINT)):
        with safe_open(path, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118, it is no mapping
                target, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, ours)
                if target not in ours:
                    found[name] = path
    return found


def stored_bytes(tensors: Mapping[str, Path]) -> int:
    """Return the size of `tensors`, a map of names to their safetensors files. Reads the files' headers only."""
    from safetensors import safe_open

    total = 0
    for path in set(tensors.values()):
        with safe_open(path, "pt") as stored:
            total += sum(stored.get_tensor(name).nbytes for name, file in tensors.items() if file == path)
    return total


def _folder(source: str) -> Path:
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(source, allow_patterns=CHECKPOINT, local_files_only=True))
    return folder
