"""What rules a model family out, from its configuration alone: models are built on the meta device, without weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from common.error_text import one_line
from common.models.positions import fix_rope, sequence_limit


def model_on_meta(config: Any) -> Any:
    """Build the causal language model of a configuration, without weights.

    Raises ValueError, in one line, for a configuration that transformers has no decoder for.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(
            f"model type {config.model_type}: transformers has no causal language model for it; use the checkpoint of "
            "its language model alone"
        )
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (AssertionError, AttributeError, ImportError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"transformers cannot build it: {one_line(error)}") from error
    if model.get_output_embeddings() is None or model.get_decoder() is model or config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} is not a decoder with a separate output layer")
    return model


def family_faults(model: Any, max_sequence_tokens: int | None) -> Iterator[str]:
    """Yield what no service can compute for `model`: positions without a limit, or that depend on the batch."""
    if sequence_limit(model.config, max_sequence_tokens) is None:
        yield "its configuration names no longest sequence: set max_sequence_tokens"
        return
    try:
        fix_rope(model, max_sequence_tokens)
    except ValueError as fault:
        yield str(fault)
