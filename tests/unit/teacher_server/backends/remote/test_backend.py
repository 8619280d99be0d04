"""The remote backend in front of a stand-in for vLLM: scores, invalid replies, and the model behind the address."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from common.protocol.schema import LOGPROB_FLOOR, ItemError, ItemScore, ScoreItem, ScoreMode, as_ids
from teacher_server.backends.base import BackendError, BackendLost, Work
from teacher_server.backends.remote import backend as module
from teacher_server.backends.remote import endpoint as endpoint_module
from teacher_server.backends.remote import model as model_module
from teacher_server.backends.remote.prompt_rows import MASS_ERROR
from tests.support.fake_vllm import ADDRESS, FakeVllm, V, connect
from tests.support.teacher_oracle import assert_score, random_item


@pytest.fixture(autouse=True)
def no_probe_by_age(monkeypatch: pytest.MonkeyPatch) -> None:
    """No check of the model because a slow machine let time pass."""
    monkeypatch.setattr(module, "PROBE_EVERY_S", float("inf"))


def work_of(mode: ScoreMode, *, seed: int = 0, prefix: Any = None, k: int = 5, response: int = 7) -> Work:
    item = random_item(np.random.default_rng(seed), prompt=3, response=response, vocabulary=V)
    return Work(ScoreItem(item.context, item.prompt_ids, item.response_ids), prefix, mode, 1.0, k)


def expected(fake: FakeVllm, work: Work) -> torch.Tensor:
    before = as_ids([]) if work.prefix is None else work.prefix.ids
    ids = as_ids(np.concatenate([before, work.item.prompt_ids, work.item.response_ids]))
    return torch.from_numpy(fake.logprobs(ids)[-work.item.response_ids.size :])


# --- scores ---------------------------------------------------------------------------------------------------------


def test_scores_are_the_full_distribution_with_its_tail() -> None:
    fake = FakeVllm(max_logprobs=V)
    backend = connect(fake)
    assert (backend.vocab_size, backend.max_sequence_tokens, backend.model_name) == (V, 511, "m")
    first, second = backend.prefill([as_ids(range(10)), as_ids(range(4))], None)
    (third,) = backend.prefill([as_ids([7])], second)
    assert [prefix.total_tokens for prefix in (first, second, third)] == [10, 14, 15]
    batch = [
        work_of("teacher_topk"),
        work_of("sampled", seed=1),
        work_of("teacher_topk", seed=2, prefix=second),
        work_of("sampled", seed=3, prefix=third),
        work_of("teacher_topk", seed=4, k=V),
        work_of("teacher_topk", seed=5, k=1),
        work_of("teacher_topk", seed=6, response=0),
    ]
    *scores, empty = backend.score(batch)
    for work, score in zip(batch, scores, strict=False):
        assert isinstance(score, ItemScore), score
        assert_score(score, expected(fake, work), work.item, score.topk_ids)
        assert (score.topk_ids is not None) == (work.mode == "teacher_topk")
    assert isinstance(scores[4], ItemScore)
    assert (scores[4].tail_logprob == LOGPROB_FLOOR).all()  # all ids are inside
    assert scores[4].floored == 7
    assert isinstance(empty, ItemScore)
    assert empty.logprobs.shape == (0, 5)
    salts = [body["cache_salt"] for body in fake.requests]
    assert len(set(salts)) == len(salts)  # no user of the endpoint finds another one's tokens in its cache


def test_a_tail_below_the_error_of_a_sum_is_not_resolved() -> None:
    """Its mass is `MASS_ERROR`, or what the ids outside can have at most."""
    fake = FakeVllm(scale=40.0)
    backend = connect(fake)
    for seed in range(4):
        work = work_of("teacher_topk", seed=seed, k=8, response=20)
        (score,) = backend.score([work])
        assert isinstance(score, ItemScore)
        exact = np.exp(np.sort(expected(fake, work).numpy(), axis=1)[:, :-8]).sum(axis=1)
        found = np.exp(score.tail_logprob.astype(np.float64))
        assert (exact < MASS_ERROR).any()
        assert (np.abs(found - exact) <= 1.1 * MASS_ERROR).all()
        assert (found >= exact * 0.99).all()


def test_minus_infinity_becomes_the_floor() -> None:
    def forbid(choice: dict[str, Any]) -> None:
        next(iter(choice["prompt_logprobs"][-2].values()))["logprob"] = -9999.0  # of the token that follows

    fake = FakeVllm(damage=forbid, faults=1)
    (score,) = connect(fake).score([outside_the_top(fake)])
    assert isinstance(score, ItemScore), score
    assert score.sampled_logprob[-2] == LOGPROB_FLOOR
    assert score.floored == 1


def test_a_batch_is_sent_at_once_within_the_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, full = FakeVllm(), threading.Event()
    backend = connect(fake)

    def wait(_: httpx.Request) -> None:
        """Until the last connection is in use."""
        if fake.at_once >= model_module.MAX_CONNECTIONS:
            full.set()
        assert full.wait(600)

    fake.reply = wait
    batch = [work_of("sampled", seed=seed) for seed in range(3 * model_module.MAX_CONNECTIONS)]
    scores = backend.score(batch)
    assert fake.at_once == model_module.MAX_CONNECTIONS
    for work, score in zip(batch, scores, strict=True):
        assert isinstance(score, ItemScore)
        assert_score(score, expected(fake, work), work.item)
    monkeypatch.setattr(model_module, "REPLIES_BYTES", 1)  # no two replies fit
    fake.at_once = 0
    backend.score(batch[:4])
    assert fake.at_once == 1


# --- invalid replies ------------------------------------------------------------------------------------------------


def rows_of(choice: dict[str, Any]) -> Any:
    return choice["prompt_logprobs"]


def entry(choice: dict[str, Any], rank: int, row: int = -2) -> dict[str, Any]:
    return next(one for one in rows_of(choice)[row].values() if one["rank"] == rank)


def renamed(choice: dict[str, Any], new: str) -> None:
    """Give the best id of a row another name."""
    row = rows_of(choice)[-2]
    old = next(index for index, one in row.items() if one["rank"] == 1)
    row[new] = row.pop(old)


def moved(row: dict[str, Any]) -> None:
    """Put the first id last: the row may be another token's, and hold this one among its likely ids."""
    token = next(iter(row))
    row[token] = row.pop(token)


FAULTS = {
    "the token is not first": lambda choice: moved(rows_of(choice)[-2]),
    "the token is too likely": lambda choice: next(iter(rows_of(choice)[-2].values())).update(logprob=-0.001),
    "none": lambda choice: choice.update(prompt_logprobs=None),
    "a row less": lambda choice: rows_of(choice).pop(0),
    "a row more": lambda choice: rows_of(choice).append({}),
    "a row more before the others": lambda choice: rows_of(choice).insert(0, None),
    "an empty row": lambda choice: rows_of(choice)[-2].clear(),
    "a null row": lambda choice: rows_of(choice).__setitem__(-2, None),
    "rows of the next tokens": lambda choice: rows_of(choice).insert(0, rows_of(choice).pop()),
    "an id less": lambda choice: renamed(choice, next(reversed(rows_of(choice)[-2]))),
    "rank 2 twice": lambda choice: entry(choice, 3).update(rank=2),
    "no rank": lambda choice: entry(choice, 1).update(rank=None),
    "an id that the model lacks": lambda choice: renamed(choice, str(V)),
    "a negative id": lambda choice: renamed(choice, "-1"),
    "no id": lambda choice: renamed(choice, "<|im_end|>"),
    "NaN": lambda choice: entry(choice, 2).update(logprob=float("nan")),
    "infinite": lambda choice: entry(choice, 5).update(logprob=float("-inf")),
    "null": lambda choice: entry(choice, 2).update(logprob=None),
    "positive": lambda choice: entry(choice, 1).update(logprob=0.01),
    "mass above 1": lambda choice: [entry(choice, rank).update(logprob=-0.6) for rank in (1, 2)],
    "mass too small": lambda choice: [entry(choice, rank).update(logprob=-30.0) for rank in range(1, 6)],
    "not in order": lambda choice: entry(choice, 5).update(logprob=entry(choice, 1)["logprob"]),
    "text": lambda choice: choice.update(prompt_logprobs="no rows"),
}


def outside_the_top(fake: FakeVllm) -> Work:
    """Work whose row that is damaged has its own token outside the k most likely ids."""
    for seed in range(100):
        work = work_of("teacher_topk", seed=seed)
        row = expected(fake, work)[-2]
        if row[int(work.item.response_ids[-2])] < row.topk(5).values[-1]:
            return work
    raise AssertionError


@pytest.mark.parametrize("fault", FAULTS)
def test_an_invalid_reply_is_asked_for_once_more(fault: str) -> None:
    fake = FakeVllm(damage=FAULTS[fault], faults=1)
    backend, work = connect(fake), outside_the_top(fake)
    fake.requests.clear()
    (score,) = backend.score([work])
    assert isinstance(score, ItemScore), score
    assert len(fake.requests) == 2
    assert_score(score, expected(fake, work), work.item, score.topk_ids)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_reply_that_stays_invalid_is_an_error_of_its_item(fault: str) -> None:
    fake = FakeVllm(damage=FAULTS[fault], faults=2)
    backend, work = connect(fake), outside_the_top(fake)
    (error,) = backend.score([work])
    assert isinstance(error, ItemError)
    assert error.code == "internal"
    assert "invalid, also the second one" in error.message
    assert len(error.message) < 300
    (score,) = backend.score([work])
    assert isinstance(score, ItemScore)


def test_the_rows_of_another_model_are_refused() -> None:
    def other(request: httpx.Request) -> httpx.Response | None:
        if request.url.path == "/v1/models":
            return None
        answered = FakeVllm()(request).json()
        return httpx.Response(200, json={**answered, "model": "small"})

    with pytest.raises(BackendError, match="the reply is of the model small, not of big"):
        connect(FakeVllm(reply=other))


# --- the start ------------------------------------------------------------------------------------------------------


def test_the_model_is_chosen_by_name() -> None:
    fake = FakeVllm(names=("big", "adapter"))
    with pytest.raises(BackendError, match=r"serves several models \(big, adapter\): set teacher.endpoint_model"):
        connect(fake)
    with pytest.raises(BackendError, match=r"serves big, adapter, and not teacher\.endpoint_model huge"):
        connect(fake, endpoint_model="huge")
    backend = connect(fake, endpoint_model="adapter")
    assert isinstance(backend.score([work_of("sampled")])[0], ItemScore)
    assert {body["model"] for body in fake.requests} == {"adapter"}
    assert backend.model_fingerprint != connect(fake, endpoint_model="big").model_fingerprint


def test_a_k_that_the_endpoint_refuses_ends_the_start() -> None:
    with pytest.raises(
        BackendError, match=r"logprobs of 64, which .* with --max-logprobs 64, or set teacher.max_k"
    ) as caught:
        connect(FakeVllm(max_logprobs=20))
    assert ADDRESS in str(caught.value)
    connect(FakeVllm(max_logprobs=20), max_k=20)


def test_another_tokenizer_ends_the_start() -> None:
    fake = FakeVllm()
    tokenizer = fake.tokenizer

    class Shifted:
        def __call__(self, text: str, **options: Any) -> Any:
            ids = tokenizer(text, **options)["input_ids"]
            return {"input_ids": [index + (index == 40) for index in ids]}

    def answer(request: httpx.Request) -> httpx.Response | None:
        return shifted(request) if b'"prompt":"' in request.content else None

    shifted = FakeVllm(tokenizer=Shifted())
    fake.reply = answer
    with pytest.raises(BackendError, match=r"another tokenizer than teacher.model: .* is \[41\] there and \[40\] here"):
        connect(fake)


def test_an_endpoint_that_names_no_ids_of_a_text_ends_the_start() -> None:
    def older(request: httpx.Request) -> httpx.Response | None:
        if b'"prompt":"' not in request.content:
            return None
        return httpx.Response(200, json={"model": "big", "choices": [{"index": 0, "text": "x"}]})

    with pytest.raises(BackendError, match="returns no prompt_token_ids"):
        connect(FakeVllm(reply=older))


def test_logits_instead_of_logprobs_end_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """``--logprobs-mode raw_logits``, of a model whose logits are all negative."""
    fake = FakeVllm()
    logprobs = fake.logprobs
    monkeypatch.setattr(fake, "logprobs", lambda ids: logprobs(ids) - 12.0)
    with pytest.raises(BackendError, match="--logprobs-mode must be raw_logprobs"):
        connect(fake)


def test_scores_that_depend_on_chance_end_the_start() -> None:
    with pytest.raises(BackendError, match="differently alone and among other requests"):
        connect(FakeVllm(noise=1e-3))
    connect(FakeVllm(noise=1e-5))
    connect(FakeVllm(noise=0.02, scale=6.0), dtype="bfloat16")


# --- the model behind the address -----------------------------------------------------------------------------------


def changed(backend: Any, work: Work) -> str:
    (error,) = backend.score([work])
    assert isinstance(error, ItemError)
    assert f"the model behind the endpoint {ADDRESS} is not that of this teacher's start" in error.message
    return error.message


def test_other_weights_behind_the_address_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, work = FakeVllm(), work_of("teacher_topk")
    backend = connect(fake)
    assert isinstance(backend.score([work])[0], ItemScore)
    fake.weights = 1
    monkeypatch.setattr(module, "PROBE_EVERY_S", 0.0)
    assert "the log-probs of a fixed text moved by" in changed(backend, work)
    fake.weights = 0
    assert "moved by" in changed(backend, work)  # runs may have scores of both: until the teacher starts again
    assert connect(fake).model_fingerprint == backend.model_fingerprint
    fake.weights = 1
    assert connect(fake).model_fingerprint != backend.model_fingerprint


def test_other_settings_are_noticed_in_the_first_reply() -> None:
    fake, work = FakeVllm(), work_of("teacher_topk")
    backend = connect(fake)
    fake.system_fingerprint = "vllm-0.32.0-87654321"
    assert "system_fingerprint vllm-0.32.0-87654321" in changed(backend, work)


def test_another_model_of_the_name_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, work = FakeVllm(), work_of("teacher_topk")
    backend = connect(fake)
    fake.max_model_len = 256
    monkeypatch.setattr(module, "PROBE_EVERY_S", 0.0)
    assert "it served big (/big, 512 tokens) and serves big (/big, 256 tokens) now" in changed(backend, work)


@pytest.mark.parametrize("weights", [0, 1])
def test_a_broken_connection_has_the_model_checked_again(weights: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch's first item still gets its score from the old process, then the endpoint restarts."""
    monkeypatch.setattr("teacher_server.backends.remote.endpoint.FIRST_BACKOFF_S", 0.001)
    fake, breaks = FakeVllm(), [True]
    backend = connect(fake)

    def restart(request: httpx.Request) -> None:
        if breaks and len(request.content) < 200:
            breaks.pop()
            fake.weights = weights
            raise httpx.ReadError("connection reset")

    fake.reply = restart
    batch = [work_of("teacher_topk", seed=seed) for seed in range(3)]
    for work, result in zip(batch, backend.score(batch), strict=True):
        if weights:
            assert isinstance(result, ItemError)
            assert "is not that of this teacher's start" in result.message
        else:
            assert isinstance(result, ItemScore), result
            assert_score(result, expected(fake, work), work.item, result.topk_ids)
    assert not breaks


def test_an_endpoint_that_stays_down_fails_the_items_and_then_serves_again(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, work = FakeVllm(), work_of("teacher_topk")
    backend = connect(fake)
    monkeypatch.setattr(backend._model, "_timeout_s", 0.3)

    def down(_: httpx.Request) -> None:
        raise httpx.ConnectError("connection refused")

    fake.reply = down
    for _ in range(2):
        (error,) = backend.score([work])
        assert isinstance(error, ItemError)
        assert f"{ADDRESS} did not answer" in error.message
        assert "connection refused" in error.message
    monkeypatch.setattr(backend._model, "_timeout_s", 600.0)
    fake.reply = lambda _: None
    (score,) = backend.score([work])
    assert isinstance(score, ItemScore), score


def test_a_refused_item_fails_alone() -> None:
    """For example one that is too long for an endpoint that states no limit."""
    fake = FakeVllm()
    backend = connect(fake)

    def refuse(request: httpx.Request) -> httpx.Response | None:
        if b"[0,1,2," not in request.content:
            return None
        return httpx.Response(400, json={"error": {"message": "too long"}})

    fake.reply = refuse
    refused = work_of("sampled")
    refused = replace(refused, item=replace(refused.item, prompt_ids=as_ids([0, 1, 2])))
    error, score = backend.score([refused, work_of("sampled", seed=1)])
    assert isinstance(error, ItemError)
    assert error.message == f"the endpoint {ADDRESS}: HTTP 400 too long"
    assert isinstance(score, ItemScore)


def test_an_endpoint_that_dies_of_an_item_is_lost_and_the_item_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheduler then sends item by item, and refuses the deadly one for good."""
    monkeypatch.setattr(endpoint_module, "FIRST_BACKOFF_S", 0.0)
    fake = FakeVllm()
    backend = connect(fake)
    batch = [work_of("sampled", seed=seed) for seed in range(3)]
    fatal = str(batch[1].item.response_ids.tolist())[1:-1].replace(" ", "").encode()

    def dies(request: httpx.Request) -> None:
        if fatal in request.content.replace(b" ", b""):
            raise httpx.ReadError("connection reset")

    fake.reply = dies
    for some in (batch, batch[1:2]):
        with pytest.raises(BackendLost, match=r"did not answer .*connection reset"):
            backend.score(some)
    backend.restart()
    for alive in (batch[0], batch[2]):
        (score,) = backend.score([alive])
        assert isinstance(score, ItemScore)


def test_an_internal_error_of_the_endpoint_is_an_error_of_its_item(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "FIRST_BACKOFF_S", 0.0)
    fake = FakeVllm()
    backend = connect(fake)
    fake.reply = lambda _: httpx.Response(500, text="out of memory")
    (result,) = backend.score([work_of("sampled")])
    assert isinstance(result, ItemError)
    assert "HTTP 500" in result.message
