"""Families that vLLM 0.32.0 computes otherwise than transformers, and those that its CPU build does not compute.

Keys are types of text models. Each line is a cell of docs/models.md, whose test compares the two.
"""

from __future__ import annotations

from typing import Any

OTHERWISE = ("ministral3", "cohere2", "gemma3n_text", "nemotron_h", "bloom", "apertus", "lfm2", "gpt_neox")
"""Families whose log-probs differ from transformers' before the first step."""
CPU_BFLOAT16 = ("qwen3_next", "deepseek_v2", "deepseek_v3")
"""Families whose CPU kernels compute in bfloat16 only, and there otherwise than transformers on tiny random models."""
CPU_NEVER = ("mamba", "mamba2", "minimax_m2", "phimoe", "phi", "ernie4_5_moe")
"""Families that fail on CPU: in their kernels, after a sync (Phi's bias), or because the router there leaves out its
correction bias (ERNIE)."""
NEVER = ("gpt_neo", "minimax")
"""Families that this vLLM has no model for."""
QWEN2 = ("qwen2", "qwen2_5_vl_text")
"""Types that vLLM computes with its class of Qwen2."""
TORCHVISION = ("qwen3_5_text", "qwen3_5_moe_text")
"""Text models whose code needs torchvision, as that of every vision-language model."""


def text_type(config: Any) -> str:
    """Return the type of the language model of a configuration."""
    return str(config.get_text_config().model_type)


def engine_fault(config: Any) -> str | None:
    """Explain why vLLM does not compute a model on any device; None if nothing is known."""
    text = config.get_text_config()
    if text_type(config) in NEVER:
        return f"vLLM 0.32.0 has no model for {text_type(config)}: train another model"
    layers, windows = text.num_hidden_layers, getattr(text, "max_window_layers", None)
    if text_type(config) in QWEN2 and len(set(text.layer_types)) > 1 and windows != layers:
        return (
            f"vLLM takes no window in some layers only (max_window_layers {windows} of {layers}): train another model"
        )
    return None


def cpu_fault(config: Any, dtype: str, *, torchvision: bool) -> str | None:
    """Explain why vLLM's CPU build does not compute a model in `dtype`; None if nothing is known."""
    kind = text_type(config)
    if not torchvision and (kind in TORCHVISION or config.get_text_config() is not config):
        return (
            "vLLM's code of this family needs torchvision, which is not installed here, and which PyPI has for CUDA "
            "only: train it on GPUs"
        )
    if kind in CPU_NEVER:
        return f"vLLM's CPU build does not compute {kind} rightly, or not after a sync: train it on GPUs"
    if kind in CPU_BFLOAT16 and dtype != "bfloat16":
        return "vLLM's CPU build computes this family in bfloat16 only: set student.dtype to bfloat16"
    return None
