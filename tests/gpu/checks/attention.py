"""Attention with log-sum-exp, and over shared prefixes, against plain attention in float64."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from teacher_server.backends.hf.attention import (
    AttentionPlan,
    KeyValues,
    PrefixSpan,
    attention_with_lse,
    causal_blocks,
    shared_prefix_attention,
)
from tests.gpu.place import Place
from tests.gpu.report import Figure

HEADS, KV_HEADS = 8, 2
LSE_NATS = 2.0**-9
"""Merging two parts weights them by sigmoid(difference of log-sum-exps), whose slope is at most 1/4: this error moves a
weight by 2**-11, a quarter of bfloat16's rounding."""
TIMES_NOISE = 2.0
"""Allowed error in units of the error of torch's own unfused attention in the same dtype."""


def attention(place: Place) -> Iterator[Figure]:
    """Compare both functions at head sizes 64 and 128: causal, with more keys than queries, grouped, with a prefix."""
    keys = place.sizes.attention_tokens
    queries = keys // 4
    generator = torch.Generator(place.device).manual_seed(0)
    worst_lse = worst_out = worst_shared = 0.0

    for size in (64, 128):

        def draw(heads: int, tokens: int, size: int = size) -> Tensor:
            values = torch.randn(1, heads, tokens, size, device=place.device, generator=generator)
            return (2 * values).to(torch.bfloat16)

        for causal, tokens in ((True, queries), (False, keys)):
            q, k, v = draw(HEADS, queries), draw(HEADS, tokens), draw(HEADS, tokens)
            out, lse = attention_with_lse(q, k, v, causal=causal, scale=size**-0.5)
            exact, exact_lse = plain(q.double(), k.double(), v.double(), causal=causal)
            noise = largest(plain(q, k, v, causal=causal)[0], exact)
            worst_out = max(worst_out, largest(out, exact) / noise)
            worst_lse = max(worst_lse, largest(lse, exact_lse))
        worst_shared = max(
            worst_shared, shared(place, draw(HEADS, queries), draw(KV_HEADS, keys), draw(KV_HEADS, keys))
        )
    yield Figure("output error", worst_out, "of unfused bf16", at_most=TIMES_NOISE)
    yield Figure("log-sum-exp error", worst_lse, "nats", at_most=LSE_NATS)
    yield Figure("shared prefix error", worst_shared, "of unfused bf16", at_most=TIMES_NOISE)
    q, k, v = draw(HEADS, queries), draw(HEADS, keys), draw(HEADS, keys)
    seconds = place.seconds(lambda: attention_with_lse(q, k, v, causal=False, scale=128**-0.5), 5)
    yield Figure("speed", 4 * HEADS * queries * keys * 128 / seconds / 1e12, "TFLOP/s")


def shared(place: Place, q: Tensor, k: Tensor, v: Tensor) -> float:
    """Error of two packed sequences with one cached prefix, relative to the noise of plain attention.

    The first ``C`` keys are the prefix; the sequences are the rest, half and half.
    """
    own = q.shape[2]
    prefix = k.shape[2] - own
    half = own // 2
    plan = AttentionPlan(
        blocks=causal_blocks([(0, half), (half, own - half)]),
        prefix_spans=[PrefixSpan(0, own, KeyValues([k[0, :, :prefix]], [v[0, :, :prefix]]))],
    )
    layer = torch.nn.Module()
    layer.layer_idx = 0  # type: ignore[assignment]
    out, _ = shared_prefix_attention(layer, q, k[:, :, prefix:], v[:, :, prefix:], None, attention_plan=plan)
    out = out.transpose(1, 2)
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    error = noise = 0.0
    for start, stop in ((0, half), (half, own)):
        seen = [*range(prefix), *range(prefix + start, prefix + stop)]
        index = torch.tensor(seen, device=place.device)
        rows, keys, values = q[:, :, start:stop], k[:, :, index], v[:, :, index]
        exact, _ = plain(rows.double(), keys.double(), values.double(), causal=True)
        error = max(error, largest(out[:, :, start:stop], exact))
        noise = max(noise, largest(plain(rows, keys, values, causal=True)[0], exact))
    return error / noise


def plain(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention ``[b, H, L, D]`` in the dtype of the inputs, and its log-sum-exp; causal queries are the last ones."""
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    if causal:
        length, total = scores.shape[-2:]
        scores = scores.masked_fill(
            torch.ones(length, total, dtype=torch.bool, device=q.device).triu(total - length + 1), float("-inf")
        )
    return scores.softmax(-1) @ v, scores.double().logsumexp(-1)


def largest(value: Tensor, exact: Tensor) -> float:
    """Largest absolute difference."""
    return (value.double() - exact.double()).abs().max().item()
