"""Attention over packed rows: sequences lie end to end, and each attends to itself alone.

transformers can do it with a mask of [N, N] over the row, whose cost grows with the square of the micro-batch; the
function here never looks across a border, so there is nothing to mask.

A model is packed only where it is known to need nothing but causal attention over whole sequences, and where its
hidden states were seen to be those of the padded layout (`pack`); else its rows stay padded, with a line in the log.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.protocol.schema import TokenSequence, as_ids
from learner.trainer.batch_layout import PACKED, PADDED, Layout, SequenceBatch

log = logging.getLogger(__name__)

ATTENTION = "opcd_packed"
"""Name of `packed_attention` among transformers' attention implementations."""

_NEUTRAL = {"position_ids", "cu_seq_lens_k", "max_length_k", "use_cache", "output_attentions", "is_causal"}
"""What models pass on to their attention that changes nothing here."""


class PackingError(ValueError):
    """The model asks its attention for something that `packed_attention` does not do."""


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
    """Causal attention within each sequence of one packed row, as transformers calls it.

    ``query [1, H, N, D]``, ``key`` and ``value [1, H_kv, N, D]``; ``cu_seq_lens_q [S + 1]`` are the borders. Returns
    ``[1, N, H, D]``. Raises PackingError where there are no borders, or where more is asked for (a mask, dropout, a
    sliding window, a cap on scores, sinks, anything not known).
    """
    unknown = sorted(name for name, given in others.items() if given is not None and name not in _NEUTRAL)
    if attention_mask is not None or dropout or unknown or not getattr(module, "is_causal", True):
        raise PackingError(f"{type(module).__name__} asks for more than causal attention: {unknown or 'mask, dropout'}")
    if cu_seq_lens_q is None or max_length_q is None or query.shape[0] != 1:
        raise PackingError(f"{type(module).__name__} does not pass the borders of packed sequences on")
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
    alone = [
        nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
        for q, k, v in parts
    ]
    return torch.cat(alone, dim=2).transpose(1, 2), None


def _deterministic() -> bool:
    """The fused kernel adds up its gradients in any order."""
    return torch.are_deterministic_algorithms_enabled()


def why_not(config: Any) -> str | None:
    """What in a Hugging Face configuration rules packing out; None: nothing that is known of.

    These act on sequences longer than any self-check has, so they are read, not tried.
    """
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        return f"it has layers of {', '.join(sorted(kinds))}"
    for name in ("sliding_window", "attention_chunk_size"):
        if getattr(text, name, None) is not None:
            return f"it has a {name}"
    return None


def pack(model: Any) -> Layout:
    """Switch `model` to packed rows where it can; the layout that its batches must have from now on.

    Run it on the model as it will be called (under ZeRO-3: on every rank).
    """
    reason = why_not(model.config)
    if reason is None:
        reason = _switch(model)
    if reason is None:
        return PACKED
    log.info("sequences are padded, not packed: %s: %s", type(model).__name__, reason)
    return PADDED


def _switch(model: Any) -> str | None:
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, packed_attention)
    before = model.config._attn_implementation
    sequences = _probe(int(model.get_input_embeddings().weight.shape[0]) or int(model.config.vocab_size))
    try:
        padded = _hidden(model, PADDED.lay_out(sequences))
        model.set_attn_implementation(ATTENTION)
        packed = _hidden(model, PACKED.lay_out(sequences))
    except (RuntimeError, TypeError, ValueError) as error:  # whatever a model that was never meant for it may raise
        reason = f"{type(error).__name__}: {error}"
    else:
        difference = ((packed - padded).norm() / padded.norm()).item()
        limit = 1e-4 if next(model.parameters()).dtype == torch.float32 else 0.05
        if difference < limit:  # not so for NaN
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
