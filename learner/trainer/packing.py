"""Attention over packed rows: sequences lie end to end, and each attends only to itself.

transformers uses an [N, N] mask over the row, whose cost grows with the square of the micro-batch. The function
here computes attention within each sequence only, so it needs no mask.

`pack` packs a model only if its configuration asks for nothing but causal attention over whole sequences, and a
self-check finds the hidden states of the padded layout. Otherwise rows stay padded, and the run says why.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.protocol.schema import TokenSequence, as_ids
from learner.trainer.batch_layout import PACKED, PADDED, SequenceBatch

ATTENTION = "opcd_packed"
"""Name of `packed_attention` among transformers' attention implementations."""

_NEUTRAL = {"position_ids", "cu_seq_lens_k", "max_length_k", "use_cache", "output_attentions", "is_causal"}
"""Arguments that models pass to their attention and that have no effect here."""


class PackingError(ValueError):
    """The model needs an attention feature that `packed_attention` does not support."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Compute causal attention within each sequence of one packed row, with transformers' attention signature.

    ``query [1, H, N, D]``, ``key`` and ``value [1, H_kv, N, D]``; ``cu_seq_lens_q [S + 1]`` are the borders. Returns
    ``[1, N, H, D]``. Raises PackingError without borders, or if the model asks for more (a mask, dropout, a sliding
    window, a cap on scores, sinks, any unknown argument).
    """
    unknown = sorted(name for name, given in others.items() if given is not None and name not in _NEUTRAL)
    if attention_mask is not None or dropout or unknown or not getattr(module, "is_causal", True):
        raise PackingError(f"{type(module).__name__} asks for more than causal attention: {unknown or 'mask, dropout'}")
    if cu_seq_lens_q is None or max_length_q is None or query.shape[0] != 1:
        raise PackingError(f"{type(module).__name__} does not pass the borders of packed sequences to its attention")
    grouped = query.shape[1] != key.shape[1]
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and not _deterministic():
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # [N, H, D]
        causal, longest = (-1, 0), max_length_q
        out = varlen_attn(
            q,
            k,
            v,
            cu_seq_lens_q,
            cu_seq_lens_q,
            longest,
            longest,
            scale=scaling,
            window_size=causal,
            enable_gqa=grouped,
        )
        assert isinstance(out, Tensor)
        return out.unsqueeze(0), None
    lengths = torch.diff(cu_seq_lens_q).tolist()
    parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = [
        nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
        for q, k, v in parts
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _deterministic() -> bool:
    """Return True in deterministic mode, which rules out the fused kernel: it sums gradients in any order."""
    return torch.are_deterministic_algorithms_enabled()


def _obstacle(config: Any) -> str | None:
    """Return the setting of a Hugging Face configuration that rules packing out, or None.

    These settings act on sequences longer than the self-check's, so it cannot detect them.
    """
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        return f"it has layers of {', '.join(sorted(kinds))}"
    for name in ("sliding_window", "attention_chunk_size"):
        if getattr(text, name, None) is not None:
            return f"it has a {name}"
    return None


def pack(model: Any) -> str | None:
    """Switch `model` to packed rows if possible; otherwise leave it as it is and return the reason.

    Call it after `deepspeed.initialize`; under ZeRO-3 a collective.
    """
    return _obstacle(model.config) or _switch(model)


def _switch(model: Any) -> str | None:
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, packed_attention)
    before = model.config._attn_implementation
    sequences = _probe(int(model.get_input_embeddings().weight.shape[0]) or int(model.config.vocab_size))
    try:
        padded = _hidden(model, PADDED.lay_out(sequences))
        model.set_attn_implementation(ATTENTION)
        packed = _hidden(model, PACKED.lay_out(sequences))
    except (RuntimeError, TypeError, ValueError) as error:  # errors of models not written for packing
        reason = f"{type(error).__name__}: {error}"
    else:
        difference = ((packed - padded).norm() / padded.norm()).item()
        limit = 1e-4 if next(model.parameters()).dtype == torch.float32 else 0.05
        if difference < limit:  # False for NaN
            return None
        reason = f"hidden states differ by {difference:.2g} of their size from those of the padded layout"
    model.set_attn_implementation(before)
    return reason


def _probe(vocabulary: int) -> list[TokenSequence]:
    rng = np.random.default_rng(0)
    return [TokenSequence(*(as_ids(rng.integers(0, vocabulary, n)) for n in sizes)) for sizes in ((1, 7), (9, 14))]


@torch.no_grad()
def _hidden(model: Any, batch: SequenceBatch) -> Tensor:
    batch = batch.to(model.device)
    states = model.base_model(**batch.inputs, use_cache=False).last_hidden_state
    return states.flatten(0, 1)[batch.positions].float()
