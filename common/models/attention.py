"""The attention implementation that computes what a model's configuration asks for."""

from __future__ import annotations

from typing import Any


def attention_implementation(config: Any) -> str | None:
    """Return `eager` for a model that caps its attention scores (Gemma 2), which sdpa ignores; None: the default."""
    return "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else None
