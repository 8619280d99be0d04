"""Attention over one packed row of tokens whose sequences share prefixes.

A batch is one row ``[1, N]``, so linear layers process no padding. A token attends to

* its own node (a run of tokens of one sequence), with a causal mask, and
* every prefix of its node, without a mask: a cached context, or the node of a prompt that several responses share.

Each part is an exact attention with its log-sum-exp. The parts are merged by their log-sum-exps: a softmax over a
concatenation is the mean of the parts' softmaxes, weighted by their normalisers. So all sequences read a context's keys
and values in place, and the cost is linear in the number of sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

ATTENTION_NAME = "opcd_shared_prefix"
"""Name of the function in transformers' registry of attentions."""

_NEUTRAL = {"position_ids", "use_cache", "output_attentions", "is_causal"}
"""Arguments that models pass to their attention and that have no effect here."""


@dataclass(frozen=True, slots=True, eq=False)
class KeyValues:
    """Keys and values of a run of tokens, per layer ``[key-value heads, tokens, head size]``, positions applied."""

    keys: list[Tensor]
    values: list[Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class PrefixSpan:
    """Queries ``start:stop`` of the packed row attend to all of `source`: cached, or a slice of the row."""

    start: int
    stop: int
    source: KeyValues | slice


@dataclass(frozen=True, slots=True, eq=False)
class CausalBlock:
    """Nodes of similar length, padded to one block.

    ``gather [b, L]`` holds indices into the packed row (padding repeats a node's last one), ``valid`` the real entries
    of the flattened block, and ``positions`` their indices in the packed row.
    """

    gather: Tensor
    valid: Tensor
    positions: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class AttentionPlan:
    """Attention pattern of one forward pass. A `record` collects keys and values by layer."""

    blocks: Sequence[CausalBlock]
    prefix_spans: Sequence[PrefixSpan]
    record: dict[int, tuple[Tensor, Tensor]] | None = field(default=None)


def causal_blocks(nodes: Sequence[tuple[int, int]], *, waste: float = 0.25) -> list[CausalBlock]:
    """Blocks for nodes (start, length), longest first; padding is at most about `waste` of a block."""
    blocks: list[CausalBlock] = []
    ordered = sorted((node for node in nodes if node[1]), key=lambda node: -node[1])
    while ordered:
        longest = ordered[0][1]
        shortest = max(1, int(longest * (1 - waste)))
        taken = [node for node in ordered if node[1] >= shortest]
        ordered = ordered[len(taken) :]
        starts = torch.tensor([start for start, _ in taken])[:, None]
        lengths = torch.tensor([length for _, length in taken])[:, None]
        offsets = torch.arange(longest)[None, :]
        gather = starts + torch.minimum(offsets, lengths - 1)
        valid = (offsets < lengths).flatten().nonzero().flatten()
        blocks.append(CausalBlock(gather=gather, valid=valid, positions=gather.flatten()[valid]))
    return blocks


class UnsupportedAttention(RuntimeError):
    """The model asks for an attention which this module does not compute."""


def obstacle(config: Any) -> str | None:
    """Return the setting of a text configuration that rules `shared_prefix_attention` out, or None.

    These settings act on sequences longer than a self-check's, so it cannot find them.
    """
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"]) - {"full_attention"}
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "layer_types", None) and window and getattr(config, "use_sliding_window", True):
        kinds.add(f"a sliding window of {window} tokens")
    if getattr(config, "attention_chunk_size", None):
        kinds.add("chunked attention")
    if getattr(config, "attn_logit_softcapping", None):
        kinds.add("capped attention scores")
    return f"it has {', '.join(sorted(kinds))}" if kinds else None


def shared_prefix_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    attention_plan: AttentionPlan | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers: ``query [1, H, N, D]`` to ``[1, N, H, Dv]``.

    Raises UnsupportedAttention without a plan, or if the model asks for more than causal attention (a mask, dropout, a
    window, a cap on scores, sinks, any unknown argument).
    """
    name = type(module).__name__
    if attention_plan is None or attention_mask is not None:
        raise UnsupportedAttention(f"{name} does not pass the attention plan, or passes a mask")
    unknown = sorted(key for key, given in others.items() if given is not None and key not in _NEUTRAL)
    if unknown or dropout or not getattr(module, "is_causal", True):
        raise UnsupportedAttention(f"{name} asks for more than causal attention: {', '.join(unknown) or 'dropout'}")
    q, k, v = query[0], key[0], value[0]
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    if attention_plan.record is not None:
        attention_plan.record[cast(int, module.layer_idx)] = (k.contiguous(), v.contiguous())
    out = q.new_empty((*q.shape[:2], v.shape[-1]), dtype=torch.float32)
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    for block in attention_plan.blocks:
        _attend_block(q, k, v, block, scale, out, lse)
    for span in attention_plan.prefix_spans:
        if isinstance(span.source, slice):
            keys, values = k[:, span.source], v[:, span.source]
        else:
            layer = cast(int, module.layer_idx)
            keys, values = span.source.keys[layer], span.source.values[layer]
        _merge_prefix(q, keys, values, span, scale, out, lse)
    return out.to(query.dtype).transpose(0, 1)[None], None


def _attend_block(q: Tensor, k: Tensor, v: Tensor, block: CausalBlock, scale: float, out: Tensor, lse: Tensor) -> None:
    """Write causal attention inside the nodes of one block to `out [H, N, D]` and `lse [H, N]`."""
    count, length = block.gather.shape
    index = block.gather.flatten().to(q.device)
    groups = q.shape[0] // k.shape[0]

    def padded(tensor: Tensor, repeat: int) -> Tensor:
        rows = tensor[:, index].unflatten(1, (count, length)).transpose(0, 1)
        return rows if repeat == 1 else rows.repeat_interleave(repeat, dim=1)

    block_out, block_lse = attention_with_lse(
        padded(q, 1), padded(k, groups), padded(v, groups), causal=True, scale=scale
    )
    valid, positions = block.valid.to(q.device), block.positions.to(q.device)
    out[:, positions] = block_out.transpose(0, 1).flatten(1, 2)[:, valid].float()
    lse[:, positions] = block_lse.transpose(0, 1).flatten(1, 2)[:, valid]


def _merge_prefix(
    q: Tensor, keys: Tensor, values: Tensor, span: PrefixSpan, scale: float, out: Tensor, lse: Tensor
) -> None:
    """Merge attention of the span's queries to `keys [h, C, D]` into `out` and `lse`; a group's heads are adjacent."""
    heads, count = q.shape[0], span.stop - span.start
    rows = q[:, span.start : span.stop]
    # Heads of a group share keys. Without a mask they are just more queries, so keys are not repeated.
    folded = rows.reshape(1, keys.shape[0], -1, q.shape[-1])
    other, other_lse = attention_with_lse(folded, keys[None], values[None], causal=False, scale=scale)
    other = other.reshape(heads, count, -1).float()
    other_lse = other_lse.reshape(heads, count)
    here, here_lse = out[:, span.start : span.stop], lse[:, span.start : span.stop]
    here.lerp_(other, torch.sigmoid(other_lse - here_lse)[..., None])
    here_lse.copy_(torch.logaddexp(here_lse, other_lse))


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Attention ``[b, H, L, Dv]`` and the log-sum-exp of its scores ``[b, H, L]`` (f32), from a fused kernel if any.

    Kernels want one head size, so a smaller one (of keys, or of values: MLA) is filled up with zeros.
    """
    head, width = max(q.shape[-1], v.shape[-1]), v.shape[-1]
    if q.shape[-1] != width:
        q, k, v = (torch.nn.functional.pad(t, (0, head - t.shape[-1])) for t in (q, k, v))
        out, lse = attention_with_lse(q, k, v, causal=causal, scale=scale)
        return out[..., :width], lse
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        return out, lse
    if q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] <= 256:
        result = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
        return result[0], result[1][..., : q.shape[2]]
    return eager_attention_with_lse(q, k, v, causal=causal, scale=scale)


def eager_attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float, rows: int = 512
) -> tuple[Tensor, Tensor]:
    """`attention_with_lse` for devices and dtypes without such a kernel, `rows` queries at a time."""
    outs, lses = [], []
    columns = torch.arange(k.shape[2], device=q.device)
    for start in range(0, q.shape[2], rows):
        scores = (q[:, :, start : start + rows].float() @ k.float().mT) * scale
        if causal:
            position = torch.arange(start, start + scores.shape[2], device=q.device)
            scores.masked_fill_(columns[None, :] > position[:, None], float("-inf"))
        lse = scores.logsumexp(-1)
        outs.append(((scores - lse[..., None]).exp() @ v.float()).to(q.dtype))
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)
