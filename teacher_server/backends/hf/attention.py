"""Attention over one packed row of tokens whose sequences share prefixes.

All tokens of a batch lie in one row ``[1, N]``, so linear layers never see padding. A token attends to

* its *own* node (a run of tokens of one sequence), causally, and
* every *cross* source of its node: a cached context, or the node of a prompt that several responses share.

Each part is one exact attention with its log-sum-exp, and the parts are merged by these (``softmax`` over a
concatenation is the mean of the parts' softmaxes weighted by their normalisers). A context's keys and values are thus
read where they lie, by all sequences at once, and the cost stays linear in the number of sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from teacher_server.backends.base import BackendError

NAME = "opcd_shared_prefix"
"""Under which the function is registered with transformers."""


@dataclass(frozen=True, slots=True, eq=False)
class KeyValues:
    """Keys and values of a run of tokens, per layer ``[key-value heads, tokens, head size]``, positions applied."""

    keys: Sequence[Tensor]
    values: Sequence[Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Cross:
    """Queries ``start:stop`` of the packed row attend, without a mask, to `source`: cached, or a slice of the row."""

    start: int
    stop: int
    source: KeyValues | slice


@dataclass(frozen=True, slots=True, eq=False)
class OwnBlock:
    """Nodes of similar length, padded together: ``gather [b, L]`` are packed positions (padding repeats the last one),
    ``valid`` picks the real entries of the flattened block, ``positions`` is where they lie in the packed row.
    """

    gather: Tensor
    valid: Tensor
    positions: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class AttentionPlan:
    """Who attends to what in one forward pass. With `record` the keys and values of every layer are kept in it."""

    blocks: Sequence[OwnBlock]
    crosses: Sequence[Cross]
    record: dict[int, tuple[Tensor, Tensor]] | None = field(default=None)


def own_blocks(nodes: Sequence[tuple[int, int]], *, waste: float = 0.25) -> list[OwnBlock]:
    """Blocks for nodes given as (start, length), longest first, none padded by more than about `waste`."""
    blocks: list[OwnBlock] = []
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
        blocks.append(OwnBlock(gather=gather, valid=valid, positions=gather.flatten()[valid]))
    return blocks


def refuse_unusual_attention(config: Any) -> None:
    """Raises BackendError for a model whose attention is another one than this module's."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"]) - {"full_attention"}
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "layer_types", None) and window and getattr(config, "use_sliding_window", True):
        kinds.add(f"sliding window of {window} tokens")
    if getattr(config, "attention_chunk_size", None):
        kinds.add("chunked attention")
    if getattr(config, "attn_logit_softcapping", None):
        kinds.add("capped attention scores")
    if kinds:
        raise BackendError(
            f"model type {config.model_type}: the transformers backend scores full causal attention only, "
            f"and this model has {', '.join(sorted(kinds))}"
        )
    if "longrope" in _rope_types(getattr(config, "rope_parameters", None) or {}):
        raise BackendError(
            f"model type {config.model_type}: rope_type longrope turns the positions of a whole forward pass by its "
            "longest sequence, so a context's keys would depend on what they are used for; "
            "teacher.backend=vllm may take this model"
        )


def _rope_types(parameters: Mapping[str, Any]) -> set[str]:
    """Of one set of parameters, or of one a layer type."""
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    return {str(each.get("rope_type", "default")) for each in (nested or [parameters])}


def shared_prefix_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    attention_plan: AttentionPlan | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The function registered with transformers: ``query [1, H, N, D]`` to ``[1, N, H, D]``."""
    if attention_plan is None or attention_mask is not None:
        raise RuntimeError("this attention runs packed rows under a plan, without a mask")
    if softcap is not None or s_aux is not None:
        raise RuntimeError("capped scores and attention sinks cannot be merged by log-sum-exp")
    q, k, v = query[0], key[0], value[0]
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    if attention_plan.record is not None:
        attention_plan.record[cast(int, module.layer_idx)] = (k.contiguous(), v.contiguous())
    out = q.new_empty(q.shape, dtype=torch.float32)
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    for block in attention_plan.blocks:
        _own(q, k, v, block, scale, out, lse)
    for cross in attention_plan.crosses:
        if isinstance(cross.source, slice):
            keys, values = k[:, cross.source], v[:, cross.source]
        else:
            layer = cast(int, module.layer_idx)
            keys, values = cross.source.keys[layer], cross.source.values[layer]
        _merge(q, keys, values, cross, scale, out, lse)
    return out.to(query.dtype).transpose(0, 1)[None], None


def _own(q: Tensor, k: Tensor, v: Tensor, block: OwnBlock, scale: float, out: Tensor, lse: Tensor) -> None:
    """Causal attention inside the nodes of one block, written to their places in `out [H, N, D]`, `lse [H, N]`."""
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


def _merge(q: Tensor, keys: Tensor, values: Tensor, cross: Cross, scale: float, out: Tensor, lse: Tensor) -> None:
    """Add what queries ``cross.start:cross.stop`` see in `keys [h, C, D]`; query heads of a group lie side by side."""
    heads, count = q.shape[0], cross.stop - cross.start
    rows = q[:, cross.start : cross.stop]
    # A group's heads share keys: without a mask they are simply more queries, and no key is ever repeated.
    folded = rows.reshape(1, keys.shape[0], -1, q.shape[-1])
    other, other_lse = attention_with_lse(folded, keys[None], values[None], causal=False, scale=scale)
    other = other.reshape(heads, count, -1).float()
    other_lse = other_lse.reshape(heads, count)
    here, here_lse = out[:, cross.start : cross.stop], lse[:, cross.start : cross.stop]
    here.lerp_(other, torch.sigmoid(other_lse - here_lse)[..., None])
    here_lse.copy_(torch.logaddexp(here_lse, other_lse))


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Attention ``[b, H, L, D]`` and the log-sum-exp of its scores ``[b, H, L]`` (f32), by a fused kernel."""
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        return out, lse
    if q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] <= 256:
        result = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
        return result[0], result[1][..., : q.shape[2]]
    return _plain_attention(q, k, v, causal=causal, scale=scale)


def _plain_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float, rows: int = 512
) -> tuple[Tensor, Tensor]:
    """The same in plain torch, `rows` queries at a time, for devices and types without a kernel that gives the lse."""
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
