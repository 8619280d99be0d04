"""Nats per token of a text in chunks, and their change."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from common.evaluation.perplexity import Perplexity, perplexity, perplexity_change, split_into_chunks
from common.protocol.schema import as_ids


@pytest.mark.parametrize(("tokens", "size"), [(2, 512), (10, 4), (11, 4), (12, 4), (512, 512), (7, 2)])
def test_every_token_but_the_first_is_predicted_once(tokens: int, size: int) -> None:
    chunks = split_into_chunks(as_ids(range(tokens)), size)
    assert [i for chunk in chunks for i in chunk.response_ids.tolist()] == list(range(1, tokens))
    for chunk in chunks:
        assert len(chunk.prompt_ids) == 1
        assert chunk.prompt_ids[0] == chunk.response_ids[0] - 1
        assert 2 <= 1 + len(chunk.response_ids) <= size


def test_a_text_without_a_token_to_predict_is_refused() -> None:
    with pytest.raises(ValueError, match="1 tokens"):
        split_into_chunks(as_ids([3]), 8)


def test_nats_are_those_of_plain_transformers(tiny_model: Path) -> None:
    """The learner's output layer over all chunks equals ``model(labels=...)`` chunk by chunk."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from learner.trainer.batch_layout import PADDED
    from learner.trainer.policy import Policy

    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    ids = as_ids(AutoTokenizer.from_pretrained(tiny_model)("The quick brown fox jumps over the lazy dog.")["input_ids"])
    chunks = split_into_chunks(ids, 12)
    policy = Policy(model, chunk_tokens=5)
    batch = PADDED.lay_out(chunks)
    logprobs = policy.response_logprobs(batch, 1.0).numpy()
    found = perplexity(np.split(logprobs, np.cumsum(batch.lengths)[:-1]))
    losses, counts = [], []
    for chunk in chunks:
        whole = torch.tensor([[*chunk.prompt_ids.tolist(), *chunk.response_ids.tolist()]])
        with torch.no_grad():
            losses.append(model(whole, labels=whole).loss.item())
        counts.append(whole.shape[1] - 1)
    assert found.tokens == len(ids) - 1
    assert found.nats == pytest.approx(float(np.average(losses, weights=counts)), rel=1e-5)


def of(*chunks: tuple[float, int]) -> Perplexity:
    return perplexity([np.full(tokens, -nats, np.float32) for nats, tokens in chunks])


def test_a_change_is_paired_by_chunk() -> None:
    rng = np.random.default_rng(0)
    levels = rng.normal(3, 1, 50)  # chunks differ far more than training changed any of them
    before = of(*((level, 20) for level in levels))
    after = of(*((level + 0.05 + rng.normal(0, 0.01), 20) for level in levels))
    found = perplexity_change(before, after)
    assert found is not None
    assert found.change == pytest.approx(0.05, abs=0.005)
    assert found.ci95[0] < found.change < found.ci95[1]
    assert found.ci95 == pytest.approx(
        (found.change - 1.96 * 0.01 / 50**0.5, found.change + 1.96 * 0.01 / 50**0.5), abs=1e-3
    )
    assert not found.covers_zero


def test_chunks_count_by_their_tokens() -> None:
    assert of((1.0, 30), (4.0, 10)).nats == pytest.approx(1.75)
    found = perplexity_change(of((1.0, 30), (4.0, 10)), of((2.0, 30), (4.0, 10)))
    assert found is not None
    assert found.change == pytest.approx(0.75)
    assert found.ci95[0] < 0 < found.ci95[1]  # two chunks that differ say little: Student's quantile is 12.7


@pytest.mark.parametrize("sizes", [[511, 511], [511, 60], [511, 511, 200], [511] * 10])
def test_the_interval_of_a_change_covers_the_truth(sizes: list[int]) -> None:
    """Every token's change is noise around 0.05. A bootstrap over two chunks would cover it in half of the cases."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(1500):
        changes = [rng.normal(0.05, 0.3 / size**0.5) for size in sizes]
        found = perplexity_change(
            of(*((3.0, size) for size in sizes)), of(*((3 + c, size) for c, size in zip(changes, sizes, strict=True)))
        )
        assert found is not None
        covered += found.ci95[0] <= 0.05 <= found.ci95[1]
    assert 0.935 <= covered / 1500 <= 0.965


def test_one_chunk_has_no_interval_and_other_texts_are_refused() -> None:
    assert perplexity_change(of((1.0, 30)), of((2.0, 30))) is None
    with pytest.raises(ValueError, match="not the same text"):
        perplexity_change(of((1.0, 30)), of((2.0, 31)))
    with pytest.raises(ValueError, match="finite"):
        of((float("nan"), 3))


def test_a_perplexity_survives_json() -> None:
    found = of((1.0, 3), (2.0, 4))
    assert Perplexity.from_dict(json.loads(json.dumps(asdict(found)))) == found
