"""Low-rank adapters (LoRA, through peft). Training changes the adapters only; the base weights stay bit-identical.

A layer computes ``W x + s B A x`` with ``s = alpha / rank``. Inference engines receive the merged ``W + s B A`` under
the name of W, so they need no LoRA support. Below float32 the learner computes with the merged weight, too
(`learner.trainer.merged_lora`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.config.model import LoraConfig
from common.models.checkpoint_layout import other_modules

_NAME = "default"


@dataclass(frozen=True)
class Adapter:
    """The factors of one adapted weight ``[out, in]``: ``a [rank, in]``, ``b [out, rank]``."""

    a: nn.Parameter
    b: nn.Parameter
    scale: float

    def merged(self, weight: Tensor) -> Tensor:
        """Return ``weight + scale * b a`` in the dtype of `weight`, which is not modified."""
        from learner.trainer.merged_lora import merge

        return merge(weight, self.a, self.b, self.scale)


def add_adapters(model: Any, config: LoraConfig) -> None:
    """Insert adapters into `model` in place and freeze all other parameters. Adapters start at zero (b = 0).

    Raises ValueError if `target_modules` names no layer of the model, or one that stores its weight transposed (GPT-2).
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    from learner.trainer.merged_lora import MergedLinear, gather_together

    names, others = list(config.target_modules), "|".join(map(re.escape, other_modules(model)))
    settings = PeftConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=names[0] if names == ["all-linear"] else names,
        exclude_modules=rf"({others})(\..*)?" if others else None,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    rounded = model.dtype != torch.float32  # in float32 merging loses nothing
    if rounded:
        settings._register_custom_module({nn.Linear: MergedLinear})
    inject_adapter_in_model(settings, model, adapter_name=_NAME)
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and isinstance(module.get_base_layer(), Conv1D):
            raise ValueError(f"learner.lora: {name} is a Conv1D, which adapters do not support here: train all weights")
    if rounded:
        gather_together(model)


def checkpoint_name(name: str) -> str | None:
    """Return the name that a parameter has without adapters; None for the parameters of an adapter."""
    return None if ".lora_" in name else name.replace(".base_layer.", ".")


def adapters_of(model: nn.Module) -> Mapping[str, Adapter]:
    """Map the checkpoint name of each adapted weight to its adapter; empty without LoRA."""
    found: dict[str, Adapter] = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and _NAME in module.lora_A:
            a, b = module.lora_A[_NAME].weight, module.lora_B[_NAME].weight
            found[f"{name}.weight"] = Adapter(a, b, float(module.scaling[_NAME]))
    return found


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Disable the adapters inside this scope: `model` is then the base model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def save_adapter(folder: Path, factors: Mapping[str, Tensor], config: LoraConfig, base_model: str) -> None:
    """Write an adapter folder in peft's format; `factors` are the adapter parameters by name."""
    from peft import LoraConfig as PeftConfig
    from safetensors.torch import save_file

    targets = sorted({name.partition(".lora_")[0].rpartition(".")[2] for name in factors})
    settings = PeftConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=targets,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model,
        inference_mode=True,
    )
    settings.save_pretrained(str(folder))
    state = {f"base_model.model.{name.replace(f'.{_NAME}.', '.')}": value for name, value in factors.items()}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
