"""The teacher's numbers by the shortest way: a plain forward pass of [context; prompt; response] in transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.models.families import load_language_model
from common.protocol.schema import LOGPROB_FLOOR, PAD_ID, Ids, ItemScore, ScoreItem, as_ids


@dataclass(frozen=True)
class Oracle:
    """A loaded model with its own eager attention, and the length to which sequences are padded on the right.

    Padding changes nothing but the longest position of the pass, by which some models scale positions.
    """

    model: Any
    pad_to: int = 0

    @classmethod
    def load(cls, folder: Path | str, pad_to: int = 0) -> Oracle:
        model = load_language_model(str(folder), dtype=torch.float32, attn_implementation="eager")
        return cls(model.eval(), pad_to)

    @torch.inference_mode()
    def logprobs(self, context: Ids, prompt: Ids, response: Ids, temperature: float = 1.0) -> torch.Tensor:
        """Full log-softmax ``[T, V]`` that predicts each response token, in f64."""
        ids = np.concatenate([context, prompt, response]).astype(np.int64)
        padded = np.pad(ids, (0, max(0, self.pad_to - len(ids))))
        logits = self.model(input_ids=torch.from_numpy(padded)[None], use_cache=False).logits[0].double()
        first = len(ids) - response.size - 1
        return (logits[first : len(ids) - 1] / temperature).log_softmax(-1)


def assert_score(score: ItemScore, logprobs: torch.Tensor, item: ScoreItem, support: Ids | None = None) -> None:
    """f32 fields to 1e-4, f16 ones to 1e-4 + |x| / 2048; shapes and types as the schema says."""
    tokens = item.response_ids.size
    ids = item.topk_ids if support is None else support
    ids = as_ids(np.empty((tokens, 0))) if ids is None else ids
    assert score.sampled_logprob.shape == score.tail_logprob.shape == (tokens,)
    assert score.logprobs.shape == ids.shape
    assert (score.logprobs.dtype, score.sampled_logprob.dtype, score.tail_logprob.dtype) == ("f2", "f4", "f4")
    width = logprobs.shape[1]
    padded = torch.nn.functional.pad(logprobs, (0, 1), value=float("-inf"))
    places = torch.from_numpy(np.minimum(ids, width).astype(np.int64))
    expected = padded.gather(-1, places).clamp(min=LOGPROB_FLOOR).numpy()
    np.testing.assert_array_less(
        np.abs(score.logprobs.astype(np.float64) - expected), 1e-4 + np.abs(expected) / 2048 + 1e-12
    )
    sampled = logprobs.gather(-1, torch.from_numpy(item.response_ids.astype(np.int64))[:, None])[:, 0]
    np.testing.assert_allclose(score.sampled_logprob, sampled.clamp(min=LOGPROB_FLOOR).numpy(), rtol=0, atol=1e-4)
    tail = padded.scatter(-1, places, float("-inf")).logsumexp(-1).clamp(min=LOGPROB_FLOOR)
    np.testing.assert_allclose(score.tail_logprob, tail.numpy(), rtol=0, atol=1e-4)
    assert not (ids == PAD_ID).any() or score.topk_ids is not None


def random_item(
    rng: np.random.Generator,
    *,
    prompt: int,
    response: int,
    k: int = 8,
    vocabulary: int = 512,
    context: str | None = None,
) -> ScoreItem:
    """Random ids; the support has no id twice in a row."""
    rows = [rng.choice(vocabulary, k, replace=False) for _ in range(response)]
    return ScoreItem(
        context=context,
        prompt_ids=as_ids(rng.integers(0, vocabulary, prompt)),
        response_ids=as_ids(rng.integers(0, vocabulary, response)),
        topk_ids=as_ids(np.array(rows).reshape(response, k)),
    )
