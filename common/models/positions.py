"""Positions that depend on the sequence alone, never on the batch.

transformers picks the rotary frequencies of some types by the longest position of a forward pass: a token's log-prob
then depends on the sequences that share its pass. The functions here fix the frequencies once, by the longest sequence
that a service takes, as vLLM does.
"""

from __future__ import annotations

from typing import Any


def sequence_limit(config: Any, configured: int | None = None) -> int | None:
    """Return the longest sequence a service takes: `configured`, or the model's own limit; None if it names none."""
    text = config.get_text_config()
    limit = configured or getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    return None if limit is None else int(limit)


def fix_rope(model: Any, max_sequence_tokens: int | None) -> None:
    """Fix the rotary frequencies of `model` for sequences of at most `max_sequence_tokens` tokens.

    Of a model on the meta device, copies are fixed: only the errors count.

    With ``longrope`` all sequences get the long factors if `max_sequence_tokens` exceeds the original length, else the
    short ones (vLLM's rule). Raises ValueError for a model whose positions still depend on the batch.
    """
    limit = sequence_limit(model.config, max_sequence_tokens)
    for name, module in model.named_modules():
        kinds = getattr(module, "rope_type", None)
        kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
        if not any(_changes_with_length(kind) for kind in kinds):
            continue
        if module.inv_freq.is_meta:
            module = type(module)(module.config)
        if limit is None or len(kinds) > 1:
            raise ValueError(f"{_where(model, name)}: rope types {sorted(set(kinds))} cannot be fixed for one length")
        if module.rope_type == "longrope":
            _fix_long_or_short(module, limit)
        elif limit > module.original_max_seq_len:
            raise ValueError(
                f"{_where(model, name)}: rope_type {module.rope_type} changes with the sequence beyond "
                f"{module.original_max_seq_len} tokens: set max_sequence_tokens to at most that, not {limit}"
            )
        module.rope_type = "fixed"  # transformers recomputes the frequencies of two types only
        if not _same_in_any_company(module, limit):
            raise ValueError(f"{_where(model, name)} scales positions by the longest sequence of a forward pass")


def _changes_with_length(kind: str | None) -> bool:
    """Return True for the types that transformers' `dynamic_rope_update` recomputes in each forward pass."""
    return kind is not None and ("dynamic" in kind or kind == "longrope")


def _fix_long_or_short(module: Any, limit: int) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, module.attention_scaling = ROPE_INIT_FUNCTIONS["longrope"](
        module.config, module.inv_freq.device, seq_len=limit
    )
    module.inv_freq = frequencies.to(module.inv_freq.dtype)


def _same_in_any_company(module: Any, limit: int) -> bool:
    """Return True if the first positions have the same rotation alone and with position ``limit - 1``."""
    import torch

    near = torch.arange(min(8, limit), device=module.inv_freq.device)[None]
    far = torch.cat([near, near.new_tensor([[limit - 1]])], dim=1)
    like = torch.empty(0, device=near.device)
    with torch.no_grad():
        alone, together = module(like, near), module(like, far)
    return all(torch.equal(a, b[:, : a.shape[1]]) for a, b in zip(alone, together, strict=True))


def _where(model: Any, name: str) -> str:
    return f"{type(model).__name__}.{name}"
