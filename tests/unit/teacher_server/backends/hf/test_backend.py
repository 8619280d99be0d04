"""The transformers backend against plain forward passes of a real tiny model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from common.float32_head import float32_linear
from common.protocol.schema import Ids, ItemError, ItemScore, ScoreMode, as_ids
from teacher_server.backends.base import Work
from teacher_server.backends.hf import outputs, shared_prefix
from teacher_server.backends.hf.attention import attention_with_lse, eager_attention_with_lse
from teacher_server.backends.hf.backend import TransformersBackend
from teacher_server.backends.hf.packing import PrefixedSequence, PrefixState, split_into_passes
from tests.support.teacher_oracle import Oracle, assert_score, random_item

CONTEXT = as_ids(np.random.default_rng(7).integers(0, 512, 150))
NOTHING = as_ids([])


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


@pytest.fixture(scope="module")
def backend(model: Any, tiny_model: Path) -> TransformersBackend:
    return TransformersBackend(model, model_name=str(tiny_model), prefill_tokens=64)


@pytest.fixture(scope="module")
def oracle(tiny_model: Path) -> Oracle:
    return Oracle.load(tiny_model)


@pytest.fixture(scope="module")
def prefixes(backend: TransformersBackend) -> dict[int, PrefixState | None]:
    """Prefixes by length: none, a short one, its child (longer than `prefill_tokens`), a grandchild."""
    (first,) = backend.prefill([CONTEXT[:5]], None)
    second, third = backend.prefill([CONTEXT[5:100], CONTEXT[100:]], first)
    return {0: None, 5: first, 100: second, 150: third}


def work(rng: np.random.Generator, prefix: PrefixState | None, prompt: int, response: int) -> Work:
    return Work(random_item(rng, prompt=prompt, response=response), prefix, "at_ids", 1.0, 8)


def context_of(one: Work) -> Ids:
    return CONTEXT[: 0 if one.prefix is None else one.prefix.total_tokens]


def check(backend: TransformersBackend, oracle: Oracle, batch: list[Work]) -> None:
    results = backend.score(batch)
    assert len(results) == len(batch)
    for one, result in zip(batch, results, strict=True):
        assert isinstance(result, ItemScore)
        assert_score(
            result,
            oracle.logprobs(context_of(one), one.item.prompt_ids, one.item.response_ids, one.temperature),
            one.item,
        )


def test_mixed_lengths_with_and_without_context(
    backend: TransformersBackend, oracle: Oracle, prefixes: dict[int, PrefixState | None]
) -> None:
    rng = np.random.default_rng(0)
    batch = [
        work(rng, prefixes[context], int(rng.integers(1, 30)), int(rng.integers(1, 60)))
        for context in (0, 5, 100, 150, 100, 0, 150, 5, 0, 100)
    ]
    check(backend, oracle, batch)


def test_off_by_one_in_positions_would_show(
    backend: TransformersBackend, oracle: Oracle, prefixes: dict[int, PrefixState | None]
) -> None:
    """The same item one position later has another score, by far more than the tolerance."""
    rng = np.random.default_rng(1)
    one = work(rng, prefixes[100], 7, 20)
    check(backend, oracle, [one])
    (right,) = backend.score([one])
    prefix = prefixes[100]
    assert prefix is not None
    (wrong,) = backend.score([replace(one, prefix=replace(prefix, total_tokens=101))])
    assert isinstance(right, ItemScore)
    assert isinstance(wrong, ItemScore)
    assert np.abs(right.sampled_logprob - wrong.sampled_logprob).max() > 0.01


def test_off_by_one_in_rows_would_show(backend: TransformersBackend, oracle: Oracle) -> None:
    """Row t predicts response token t: the rows of the neighbours are far away."""
    one = work(np.random.default_rng(2), None, 4, 12)
    (score,) = backend.score([one])
    assert isinstance(score, ItemScore)
    logprobs = oracle.logprobs(NOTHING, one.item.prompt_ids, one.item.response_ids)
    for shift in (-1, 1):
        with pytest.raises(AssertionError):
            assert_score(score, logprobs.roll(shift, 0), one.item)


def test_context_matters(backend: TransformersBackend, prefixes: dict[int, PrefixState | None]) -> None:
    one = work(np.random.default_rng(3), prefixes[100], 4, 12)
    with_context, without = backend.score([one, replace(one, prefix=None)])
    assert isinstance(with_context, ItemScore)
    assert isinstance(without, ItemScore)
    assert np.abs(with_context.sampled_logprob - without.sampled_logprob).max() > 0.1


@pytest.mark.parametrize("context", [0, 100])
def test_several_answers_to_one_prompt(
    backend: TransformersBackend, oracle: Oracle, prefixes: dict[int, PrefixState | None], context: int
) -> None:
    """The shared prompt is laid out once; answers of one token and of none are among them."""
    rng = np.random.default_rng(4)
    prompt = as_ids(rng.integers(0, 512, 9))
    batch = [work(rng, prefixes[context], 9, tokens) for tokens in (6, 1, 17, 3)]
    batch = [replace(one, item=replace(one.item, prompt_ids=prompt)) for one in batch]
    check(backend, oracle, [*batch, work(rng, prefixes[context], 9, 5)])


@pytest.mark.parametrize("tokens", [1, 40, 200])
def test_a_batch_in_several_passes_is_scored_the_same(
    backend: TransformersBackend,
    oracle: Oracle,
    prefixes: dict[int, PrefixState | None],
    monkeypatch: pytest.MonkeyPatch,
    tokens: int,
) -> None:
    rng = np.random.default_rng(4)
    batch = [work(rng, prefixes[length], 1 + n, 3 + 5 * n) for n in range(6) for length in (0, 100)]
    batch += [replace(one, item=replace(one.item, response_ids=as_ids(one.item.response_ids[::-1]))) for one in batch]
    batch = [batch[i] for i in rng.permutation(len(batch))]
    monkeypatch.setattr(shared_prefix, "CPU_PASS_TOKENS", tokens)
    check(backend, oracle, batch)


def test_passes_hold_what_they_may_and_never_part_answers_to_one_prompt() -> None:
    def sequence(prompt: int, response: int) -> PrefixedSequence:
        return PrefixedSequence(None, as_ids([prompt] * 10), as_ids(range(response)))

    sequences = [sequence(prompt, 20) for prompt in (0, 1, 0, 2, 1, 0, 3)]
    assert split_into_passes(sequences, None) == [[0, 1, 2, 3, 4, 5, 6]]
    assert split_into_passes(sequences, 100) == [[0, 2, 5], [1, 4, 3], [6]]  # 70, 50 + 30, 30 tokens
    assert split_into_passes(sequences, 1) == [[0, 2, 5], [1, 4], [3], [6]]
    assert split_into_passes([], 5) == []


def test_one_token_answers_alone(backend: TransformersBackend, oracle: Oracle) -> None:
    rng = np.random.default_rng(5)
    check(backend, oracle, [work(rng, None, 1, 1)])
    one = work(rng, None, 3, 1)
    check(backend, oracle, [one, one])


def test_empty_prompt_under_a_context(
    backend: TransformersBackend, oracle: Oracle, prefixes: dict[int, PrefixState | None]
) -> None:
    """The first token is predicted from the context's last hidden state; alone, nothing is run at all."""
    rng = np.random.default_rng(6)
    check(backend, oracle, [work(rng, prefixes[100], 0, 1)])
    check(backend, oracle, [work(rng, prefixes[100], 0, 6), work(rng, prefixes[5], 0, 2), work(rng, prefixes[5], 2, 2)])


@pytest.mark.parametrize("mode", ["at_ids", "teacher_topk", "union", "sampled"])
def test_empty_response(backend: TransformersBackend, mode: ScoreMode) -> None:
    one = replace(work(np.random.default_rng(8), None, 3, 0), mode=mode)
    if mode in ("teacher_topk", "sampled"):
        one = replace(one, item=replace(one.item, topk_ids=None))
    (score,) = backend.score([one])
    assert isinstance(score, ItemScore)
    width = {"at_ids": 8, "teacher_topk": 8, "union": 16, "sampled": 0}[mode]
    assert score.logprobs.shape == (0, width)
    assert score.sampled_logprob.shape == (0,)


def test_modes_and_temperatures_in_one_batch(
    backend: TransformersBackend, oracle: Oracle, prefixes: dict[int, PrefixState | None]
) -> None:
    rng = np.random.default_rng(9)
    modes: list[ScoreMode] = ["at_ids", "teacher_topk", "union", "sampled"]
    batch = [
        replace(work(rng, prefixes[100], 5, 11), mode=mode, temperature=temperature, k=6)
        for mode in modes
        for temperature in (0.5, 1.0, 1.7)
    ]
    batch = [
        replace(one, item=replace(one.item, topk_ids=None)) if one.mode in ("teacher_topk", "sampled") else one
        for one in batch
    ]
    for one, score in zip(batch, backend.score(batch), strict=True):
        assert isinstance(score, ItemScore)
        logprobs = oracle.logprobs(CONTEXT[:100], one.item.prompt_ids, one.item.response_ids, one.temperature)
        assert_score(score, logprobs, one.item, support=score.topk_ids)
        best = logprobs.topk(6, dim=-1).indices.numpy()
        if one.mode == "teacher_topk":
            assert score.topk_ids is not None
            assert (score.topk_ids == best).all()
        if one.mode == "union":
            assert score.topk_ids is not None
            assert one.item.topk_ids is not None
            assert (score.topk_ids[:, :8] == one.item.topk_ids).all()
            for row, own, teachers in zip(score.topk_ids, one.item.topk_ids, best, strict=True):
                real = row[row != 0xFFFFFF]
                assert len(set(real.tolist())) == len(real)
                assert set(real.tolist()) == set(own.tolist()) | set(teachers.tolist())
        if one.mode == "sampled":
            assert (score.tail_logprob == 0).all()


def test_in_bfloat16_scores_are_as_near_to_exact_ones_as_the_models_own(tiny_model: Path) -> None:
    """The rounded weights in f32 give the exact scores; merging parts of the attention must add no noise."""
    backend = TransformersBackend.load(str(tiny_model), dtype="bfloat16")
    own = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    exact = Oracle(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).float())
    rng = np.random.default_rng(17)
    batch = [work(rng, backend.prefill([CONTEXT], None)[0], 10, 60) for _ in range(8)]
    errors: dict[str, list[float]] = {"packed": [], "own": []}
    for one, score in zip(batch, backend.score(batch), strict=True):
        sequence = (CONTEXT, one.item.prompt_ids, one.item.response_ids)
        ids = torch.from_numpy(one.item.response_ids.astype(np.int64))[:, None]
        right, rounded = (model.logprobs(*sequence).gather(-1, ids)[:, 0].numpy() for model in (exact, Oracle(own)))
        assert isinstance(score, ItemScore)
        errors["packed"] += list(score.sampled_logprob - right)
        errors["own"] += list(rounded - right)
    packed, plain = (float(np.sqrt(np.mean(np.square(errors[name])))) for name in ("packed", "own"))
    assert 0 < packed < 1.25 * plain


def test_longest_sequence(backend: TransformersBackend, oracle: Oracle) -> None:
    check(backend, oracle, [work(np.random.default_rng(10), None, 96, 4000)])


def test_untied_output_layer(tiny_untied_model: Path) -> None:
    backend, oracle = TransformersBackend.load(str(tiny_untied_model)), Oracle.load(tiny_untied_model)
    check(backend, oracle, [work(np.random.default_rng(11), backend.prefill([CONTEXT], None)[0], 5, 9)])


def test_ids_the_teacher_lacks_get_the_floor(backend: TransformersBackend, oracle: Oracle) -> None:
    """A student of the same family may have a wider output layer; its extra ids are finite, counted, and no mass."""
    one = work(np.random.default_rng(12), None, 5, 4)
    assert one.item.topk_ids is not None
    ids = one.item.topk_ids.copy()
    ids[1, 2], ids[3, 0] = 512, 0x20000
    one = replace(one, item=replace(one.item, topk_ids=ids))
    (score,) = backend.score([one])
    assert isinstance(score, ItemScore)
    assert_score(score, oracle.logprobs(NOTHING, one.item.prompt_ids, one.item.response_ids), one.item)
    assert score.logprobs[1, 2] == score.logprobs[3, 0] == -10_000
    assert score.floored == 2


def test_an_id_twice_in_a_row_is_an_error_of_its_item_alone(backend: TransformersBackend) -> None:
    good, bad = (work(np.random.default_rng(13), None, 5, 4) for _ in range(2))
    assert bad.item.topk_ids is not None
    bad.item.topk_ids[2, 3] = bad.item.topk_ids[2, 5]
    first, second = backend.score([good, bad])
    assert isinstance(first, ItemScore)
    assert isinstance(second, ItemError)
    assert second.code == "bad_ids"
    assert "position 2" in second.message


def test_logits_that_are_not_numbers_are_an_error_of_their_item_alone(tiny_untied_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_untied_model, dtype=torch.float32)
    backend = TransformersBackend(model, model_name="m")
    rng = np.random.default_rng(14)
    good, bad = work(rng, None, 5, 4), work(rng, None, 5, 4)
    bad.item.prompt_ids[2] = 511
    good.item.prompt_ids[:] = good.item.response_ids[:] = 3
    model.get_input_embeddings().weight.data[511] = float("nan")
    first, second = backend.score([good, bad])
    assert isinstance(first, ItemScore)
    assert isinstance(second, ItemError)
    assert second.code == "internal"


def test_output_layer_sees_response_positions_only(
    backend: TransformersBackend, prefixes: dict[int, PrefixState | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(15)
    rows: list[int] = []

    def counting(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        rows.append(len(hidden))
        return float32_linear(hidden, weight, bias)

    monkeypatch.setattr(outputs, "float32_linear", counting)
    backend.score([work(rng, prefixes[150], 40, 3), work(rng, None, 60, 5)])
    assert sum(rows) == 8


def test_context_is_not_run_again(
    model: Any, backend: TransformersBackend, prefixes: dict[int, PrefixState | None]
) -> None:
    tokens: list[int] = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda _, __, inputs: tokens.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    try:
        backend.score([work(np.random.default_rng(16), prefixes[150], 4, 6) for _ in range(3)])
    finally:
        hook.remove()
    assert tokens == [4 + 3 * (6 - 1)]  # one prompt (same seed), and no answer's last token


def test_prefix_bytes_is_what_a_prefix_takes(
    backend: TransformersBackend, prefixes: dict[int, PrefixState | None]
) -> None:
    prefix = prefixes[100]
    assert prefix is not None
    tensors = (*prefix.own.keys, *prefix.own.values, prefix.last_hidden)
    assert backend.prefix_bytes(95) == prefix.nbytes == sum(t.untyped_storage().nbytes() for t in tensors)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_with_lse(causal: bool) -> None:
    """The fused kernel's log-sum-exp, and the plain fallback's, are those of the definition."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 17, 16, generator=generator) for _ in range(3))
    scores = (q.double() @ k.double().mT) * 0.3
    if causal:
        scores = scores.masked_fill(torch.ones(17, 17).triu(1).bool(), float("-inf"))
    out = scores.softmax(-1) @ v.double()
    for function in (attention_with_lse, lambda *a, **b: eager_attention_with_lse(*a, **b, rows=5)):
        got, lse = function(q, k, v, causal=causal, scale=0.3)
        torch.testing.assert_close(got.double(), out, rtol=0, atol=1e-5)
        torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=0, atol=1e-5)


def test_fingerprint_follows_the_weights(tiny_model: Path, tiny_untied_model: Path) -> None:
    from teacher_server.backends.hf.fingerprint import model_fingerprint

    def load(folder: Path) -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(folder)

    one, same, other = load(tiny_model), load(tiny_model), load(tiny_untied_model)
    assert model_fingerprint(one) == model_fingerprint(same) != model_fingerprint(other)
    same.get_parameter("model.norm.weight").data[0] += 1e-3
    assert model_fingerprint(one) != model_fingerprint(same)
