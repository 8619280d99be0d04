"""Distribution of the differences between ways to compute one token's log-prob: it sets the bounds of a weight sync."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.config.model import SyncConfig
from common.float32_head import float32_linear
from common.protocol.schema import ScoreItem, TokenSequence, as_ids
from learner.loop.mismatch import mismatch_bounds
from learner.trainer.batch_layout import PACKED, PADDED, Layout
from teacher_server.backends.base import Work
from teacher_server.backends.hf.backend import TransformersBackend
from tests.gpu.checks.layouts import switch
from tests.gpu.checks.teacher import scores_of
from tests.gpu.models import joined, load, model_folder, rms
from tests.gpu.place import Place
from tests.gpu.report import Figure

Head = Callable[[Tensor, Tensor], Tensor]
HEADS: dict[str, Head] = {
    "fp32": float32_linear,
    "bf16": lambda hidden, weight: torch.nn.functional.linear(hidden, weight).float(),
}
DECODE = "decode"


def precision(place: Place) -> Iterator[Figure]:
    """Sample by cached decoding in bfloat16; score the tokens padded, packed and as a teacher; compare all pairs.

    The figures of a pair are the standard deviation, the 99% quantile and the maximum of the absolute difference.
    """
    folder = model_folder(place, place.sizes.scored)
    model = load(folder, place, torch.bfloat16)
    sequences, values = decode(model, place)
    for head in HEADS:
        values["padded", head] = scored(model, PADDED, sequences, HEADS[head])
    switch(model)
    for head in HEADS:
        values["packed", head] = scored(model, PACKED, sequences, HEADS[head])
    model.set_attn_implementation("sdpa")
    backend = TransformersBackend(model, model_name="bf16", prefill_tokens=place.sizes.prefill_tokens)
    works = [Work(ScoreItem(None, s.prompt_ids, s.response_ids), None, "sampled", 1.0, 0) for s in sequences]
    values["teacher", "fp32"] = joined([scores_of([result])[0] for result in backend.score(works)])
    del model, backend
    exact = scored(load(folder, place, torch.float32), PADDED, sequences, HEADS["fp32"])

    bounds = mismatch_bounds(SyncConfig(), dtype="bfloat16", max_staleness=0)
    for head in HEADS:
        for way in ("padded", "packed", "teacher"):
            if (way, head) in values:
                difference = values[DECODE, head] - values[way, head]
                stop = bounds.stop_nats if head == "fp32" else None
                yield Figure(f"{DECODE}-{way} {head} head: sd", rms(difference), "nats", at_most=stop)
                yield Figure("p99", difference.abs().quantile(0.99).item(), "nats")
                yield Figure("max", difference.abs().max().item(), "nats")
                outside = (difference.neg().expm1().abs() > 0.1).double().mean().item()
                share = bounds.stop_share if head == "fp32" else None
                yield Figure("beyond a tenth", 100 * outside, "%", at_most=None if share is None else 100 * share)
    yield Figure("padded-packed fp32 head: sd", rms(values["padded", "fp32"] - values["packed", "fp32"]), "nats")
    for head in HEADS:
        yield Figure(f"{DECODE}-exact {head} head: sd", rms(values[DECODE, head] - exact), "nats")
    gain = rms(values[DECODE, "fp32"] - exact) / rms(values[DECODE, "bf16"] - exact)
    yield Figure("fp32 head's error", gain, "of the bf16 head's", at_most=1.0)
    yield Figure("mean log-prob", exact.mean().item(), "nats")


@torch.inference_mode()
def decode(model: Any, place: Place) -> tuple[list[TokenSequence], dict[tuple[str, str], Tensor]]:
    """Sample from random prompts of one length, one token a pass, with the float32 head; log-probs by both heads."""
    from transformers import DynamicCache

    sizes, shape = place.sizes, place.sizes.scored
    generator = torch.Generator(place.device).manual_seed(0)
    prompts = np.random.default_rng(4).integers(0, shape.vocabulary, (sizes.samples, sizes.prompt_tokens))
    weight = model.get_output_embeddings().weight
    cache = DynamicCache()
    inputs = torch.from_numpy(prompts).to(place.device)
    tokens: list[Tensor] = []
    logprobs: dict[str, list[Tensor]] = {head: [] for head in HEADS}
    for _ in range(sizes.response_tokens):
        output = model.get_decoder()(input_ids=inputs, past_key_values=cache, use_cache=True)
        hidden = output.last_hidden_state[:, -1]
        logits = {head: layer(hidden, weight).log_softmax(-1) for head, layer in HEADS.items()}
        inputs = torch.multinomial(logits["fp32"].exp(), 1, generator=generator)
        tokens.append(inputs)
        for head, values in logprobs.items():
            values.append(logits[head].gather(-1, inputs))
    responses = torch.cat(tokens, 1).cpu().numpy()
    sequences = [TokenSequence(as_ids(p), as_ids(r)) for p, r in zip(prompts, responses, strict=True)]
    return sequences, {(DECODE, head): joined([torch.cat(values, 1)]) for head, values in logprobs.items()}


@torch.inference_mode()
def scored(model: Any, layout: Layout, sequences: list[TokenSequence], head: Head) -> Tensor:
    """Log-probs of all response tokens in `layout`."""
    batch = layout.lay_out(sequences).to(model.device)
    states = model.get_decoder()(**batch.inputs, use_cache=False).last_hidden_state.flatten(0, 1)[batch.positions]
    weight = model.get_output_embeddings().weight
    parts = [
        head(hidden, weight).log_softmax(-1).gather(-1, ids[:, None])[:, 0]
        for hidden, ids in zip(states.split(512), batch.response_ids.split(512), strict=True)
    ]
    return joined(parts)
