"""What rules a model family out, from its configuration alone: models are built on the meta device, without weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from common.error_text import one_line
from common.models.positions import fix_rope, sequence_limit


def model_class(config: Any) -> Any:
    """Return transformers' class that loads a decoder with this configuration.

    For a vision-language model without a causal language model in transformers it is that of the whole. Raises
    ValueError, in one line, for any other configuration.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    for kind in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in kind._model_mapping:
            return kind
    raise ValueError(f"model type {config.model_type}: transformers has no language model for it")


def load_language_model(model: str, **options: Any) -> Any:
    """Load a folder or hub name with transformers' class for it; `options` are those of ``from_pretrained``."""
    from transformers import AutoConfig

    return model_class(AutoConfig.from_pretrained(model)).from_pretrained(model, **options)


def model_on_meta(config: Any) -> Any:
    """Build the language model of a configuration, without weights.

    Raises ValueError, in one line, for a configuration that transformers has no decoder for.
    """
    import torch

    kind = model_class(config)
    try:
        with torch.device("meta"):
            model = kind.from_config(config)
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
