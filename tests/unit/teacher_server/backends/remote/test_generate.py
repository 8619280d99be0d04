"""The remote backend in front of a vLLM that scores given ids: a stand-in, and the classes of the installed vLLM."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from common.protocol.schema import LOGPROB_FLOOR, ItemError, ItemScore, ScoreItem, ScoreMode, as_ids
from teacher_server.backends.base import BackendError, Work
from teacher_server.backends.remote import generate
from tests.support.fake_vllm import BLOCK, FakeVllm, V, connect
from tests.support.teacher_oracle import assert_score, random_item


@pytest.fixture(autouse=True)
def no_probe_by_age(monkeypatch: pytest.MonkeyPatch) -> None:
    """No check of the model because a slow machine let time pass."""
    monkeypatch.setattr("teacher_server.backends.remote.backend.PROBE_EVERY_S", float("inf"))


MODES: tuple[ScoreMode, ...] = ("at_ids", "teacher_topk", "union", "sampled")


def work_of(mode: ScoreMode, *, seed: int = 0, prefix: Any = None, k: int = 5, response: int = 7) -> Work:
    item = random_item(np.random.default_rng(seed), prompt=3, response=response, vocabulary=V)
    if mode in ("teacher_topk", "sampled"):
        item = ScoreItem(item.context, item.prompt_ids, item.response_ids)
    return Work(item, prefix, mode, 1.0, k)


def expected(fake: FakeVllm, work: Work) -> torch.Tensor:
    before = as_ids([]) if work.prefix is None else work.prefix.ids
    ids = as_ids(np.concatenate([before, work.item.prompt_ids, work.item.response_ids]))
    return torch.from_numpy(fake.logprobs(ids)[-work.item.response_ids.size :])


def check(fake: FakeVllm, work: Work, score: ItemScore | ItemError) -> None:
    assert isinstance(score, ItemScore), score
    assert_score(score, expected(fake, work), work.item, score.topk_ids)
    assert (score.topk_ids is not None) == (work.mode in ("teacher_topk", "union"))


# --- scores ---------------------------------------------------------------------------------------------------------


def test_every_mode_is_the_full_distribution_with_its_tail() -> None:
    fake = FakeVllm(v2=True)
    backend = connect(fake, max_k=40)
    assert backend.modes == dict.fromkeys(MODES, (1.0,))
    assert backend.path == "engine"
    (prefix,) = backend.prefill([as_ids(range(10))], None)
    batch = [work_of(mode, seed=seed, prefix=prefix if seed % 2 else None) for mode in MODES for seed in range(4)]
    for work, score in zip(batch, backend.score(batch), strict=True):
        check(fake, work, score)
        assert isinstance(score, ItemScore)
        assert score.floored == 0


def test_a_union_holds_each_id_once() -> None:
    fake = FakeVllm(v2=True)
    backend, work = connect(fake, max_k=40), work_of("union")
    assert work.item.topk_ids is not None
    best = expected(fake, work).topk(3).indices.numpy()
    work.item.topk_ids[:, :3] = best
    for row in work.item.topk_ids:
        row[3:] = [index for index in range(V) if index not in row[:3]][:5]
    (score,) = backend.score([work])
    check(fake, work, score)
    assert isinstance(score, ItemScore)
    assert score.topk_ids is not None
    assert (score.topk_ids[:, 8:11] == 0xFFFFFF).all()
    assert score.floored == 0


@pytest.mark.parametrize("mode", ["at_ids", "union"])
def test_ids_that_the_model_lacks_get_the_floor(mode: ScoreMode) -> None:
    fake = FakeVllm(v2=True)
    backend, work = connect(fake, max_k=40), work_of(mode)
    assert work.item.topk_ids is not None
    work.item.topk_ids[2, :3] = [V, V + 7, 2 * V]
    (score,) = backend.score([work])
    check(fake, work, score)
    assert isinstance(score, ItemScore)
    assert (score.logprobs[2, :3] == LOGPROB_FLOOR).all()
    assert score.floored == 3


def test_unscorable_supports_are_errors_of_their_item() -> None:
    backend, twice = connect(FakeVllm(v2=True), max_k=40), work_of("at_ids")
    assert twice.item.topk_ids is not None
    twice.item.topk_ids[4, 1] = twice.item.topk_ids[4, 0]
    error, score = backend.score([twice, work_of("at_ids", seed=1)])
    assert isinstance(error, ItemError)
    assert error.code == "bad_ids"
    assert isinstance(score, ItemScore)


# --- the prefix cache -----------------------------------------------------------------------------------------------


def test_a_context_is_computed_once() -> None:
    fake = FakeVllm(v2=True)
    backend = connect(fake, max_k=40)
    fake.computed_tokens = 0
    root, leaf = backend.prefill([as_ids(range(10)), as_ids(range(20, 30))], None)
    (twin,) = backend.prefill([as_ids(range(10))], None)
    assert fake.computed_tokens == 30
    assert root.salt == leaf.salt != twin.salt  # another tenant's context
    batch = [work_of("at_ids", seed=seed, prefix=leaf) for seed in range(4)]
    for work, score in zip(batch, backend.score(batch), strict=True):
        check(fake, work, score)
    assert fake.computed_tokens == 30 + 4 * (10 + 20 % BLOCK)


@pytest.mark.parametrize("mode", MODES)
def test_rows_that_were_in_the_cache_are_asked_for_again_without_it(mode: ScoreMode) -> None:
    fake = FakeVllm(v2=True)
    backend = connect(fake, max_k=40)
    (prefix,) = backend.prefill([as_ids(range(10))], None)
    work = work_of(mode, prefix=prefix)
    backend.score([work])
    fake.generated.clear()
    (score,) = backend.score([work])  # the whole item is in the cache now
    check(fake, work, score)
    assert [body["sampling_params"]["skip_reading_prefix_cache"] for body in fake.generated] == [False, True]
    assert ["cache_salt" in body for body in fake.generated] == [True, False]


def test_a_context_that_cannot_be_computed_ahead_is_no_error() -> None:
    def refuse(request: httpx.Request) -> httpx.Response | None:
        return httpx.Response(400, text="no") if "generate" in request.url.path else None

    fake = FakeVllm(v2=True)
    backend = connect(fake, max_k=40)
    fake.reply = refuse
    (prefix,) = backend.prefill([as_ids(range(10))], None)
    fake.reply = lambda _: None
    work = work_of("at_ids", prefix=prefix)
    check(fake, work, backend.score([work])[0])


# --- invalid replies ------------------------------------------------------------------------------------------------


def changed(change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    """A damage that replaces the array of scores by a function of it."""

    def damage(reply: dict[str, Any]) -> None:
        packed = io.BytesIO()
        values = np.load(io.BytesIO(base64.b64decode(reply["prompt_token_id_logprobs"])))
        np.save(packed, np.asarray(change(values)))
        reply["prompt_token_id_logprobs"] = base64.b64encode(packed.getvalue()).decode()

    return damage


def at(row: int, column: int, value: float) -> Callable[[Any], Any]:
    def change(values: Any) -> Any:
        values[row, column] = value
        return values

    return change


FAULTS = {
    "none": lambda reply: reply.update(prompt_token_id_logprobs=None),
    "no base64": lambda reply: reply.update(prompt_token_id_logprobs="?"),
    "no array": lambda reply: reply.update(prompt_token_id_logprobs="AAAA"),
    "a row less": changed(lambda values: values[1:]),
    "a column less": changed(lambda values: values[:, 1:]),
    "flat": changed(np.ravel),
    "objects": changed(lambda values: values.astype("U4")),
    "NaN": changed(at(3, 1, np.nan)),
    "infinite": changed(at(3, 1, np.inf)),
    "positive": changed(at(3, 0, 0.01)),
    "mass above 1": changed(lambda values: np.where(np.arange(values.shape[1]) > 0, -0.5, values)),
    "another model": lambda reply: reply.update(model="small"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("mode", ["at_ids", "union"])
def test_an_invalid_reply_is_never_a_score(fault: str, mode: ScoreMode) -> None:
    fake = FakeVllm(v2=True, damage=FAULTS[fault])
    backend, work = connect(fake, max_k=40), work_of(mode)
    fake.faults = 1
    fake.generated.clear()
    check(fake, work, backend.score([work])[0])
    assert len(fake.generated) == 2
    fake.faults = 2
    (error,) = backend.score([work])
    assert isinstance(error, ItemError)
    assert "invalid, also the second one" in error.message


@pytest.mark.parametrize("rows", [0, 6])
@pytest.mark.parametrize("mode", ["teacher_topk", "union"])
def test_too_few_rows_are_never_a_score(mode: ScoreMode, rows: int) -> None:
    def cut(reply: dict[str, Any]) -> None:
        reply["prompt_logprobs"] = reply["prompt_logprobs"][-rows:] if rows else None

    fake = FakeVllm(v2=True, damage=cut)
    backend, work = connect(fake, max_k=40), work_of(mode)
    fake.faults = 2
    (error,) = backend.score([work])
    assert isinstance(error, ItemError)
    assert f"the reply has {rows} rows, the last 7 are needed" in error.message


def test_rows_of_another_position_are_seen_where_they_can_be() -> None:
    """The token's own column and the same id in the support must agree, and the two kinds of rows of a union."""
    fake = FakeVllm(v2=True)
    backend, work = connect(fake, max_k=40), work_of("at_ids")
    assert work.item.topk_ids is not None
    for row, token in zip(work.item.topk_ids, work.item.response_ids, strict=True):
        row[:] = [token, *[index for index in range(V) if index != token][:7]]
    own_column = changed(lambda values: np.concatenate([np.roll(values[:, :1], 1), values[:, 1:]], axis=1))
    for mode, damage in {"at_ids": own_column, "union": changed(lambda values: np.roll(values, 1, axis=0))}.items():
        fake.damage, fake.faults = damage, 2
        (error,) = backend.score([Work(work.item, None, mode, 1.0, 5)])  # type: ignore[arg-type]
        assert isinstance(error, ItemError)
        assert "differ" in error.message


# --- the start ------------------------------------------------------------------------------------------------------


def test_an_endpoint_without_the_route_has_fewer_modes() -> None:
    backend = connect(FakeVllm())
    assert set(backend.modes) == {"teacher_topk", "sampled"}
    assert backend.path == "full"


def test_the_token_itself_needs_one_id_more() -> None:
    with pytest.raises(BackendError, match=r"65 is greater than .*--max-logprobs 65 \(one for the token itself\)"):
        connect(FakeVllm(v2=True, max_logprobs=64))
    connect(FakeVllm(v2=True, max_logprobs=65))


def test_routes_that_disagree_end_the_start() -> None:
    other = FakeVllm(v2=True, weights=1)

    def answer(request: httpx.Request) -> httpx.Response | None:
        return other(request) if "generate" in request.url.path else None

    with pytest.raises(BackendError, match="other log-probs at /inference/v1/generate than at /v1/completions"):
        connect(FakeVllm(reply=answer), max_k=40)


# --- the installed vLLM ---------------------------------------------------------------------------------------------


def test_the_installed_vllm_takes_the_requests_and_gives_such_replies() -> None:
    """The installed vLLM has the route, the request's fields and the reply's form that a GPU run uses."""
    from vllm.entrypoints.scale_out.token_in_token_out.api_router import router
    from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest, GenerateTokensResponse
    from vllm.logprobs import Logprob
    from vllm.utils.serial_utils import numpy2base64

    assert generate.PATH in [getattr(route, "path", None) for route in router.routes]
    fake, work = FakeVllm(v2=True), work_of("union")
    ids = as_ids(np.concatenate([work.item.prompt_ids, work.item.response_ids]))
    body = json.loads(json.dumps(generate.request_body("big", ids, work, V, "salt")))
    request = GenerateRequest.model_validate(body)
    assert (request.model, request.token_ids, request.cache_salt) == ("big", ids.tolist(), "salt")
    sampling = request.sampling_params
    assert (sampling.max_tokens, sampling.temperature, sampling.detokenize) == (1, 0, False)
    assert (sampling.prompt_logprobs, sampling.prompt_logprob_start) == (5, 2)
    assert np.shape(sampling.prompt_logprob_token_ids) == (7, 9)
    assert sampling.skip_reading_prefix_cache is False
    alone = GenerateRequest.model_validate(generate.request_body("big", ids, work, V, None))
    assert alone.sampling_params.skip_reading_prefix_cache is True
    prefill = GenerateRequest.model_validate(generate.prefill_body("big", ids, "salt"))
    assert prefill.sampling_params.skip_reading_prefix_cache is False

    answered = fake._generate(body).json()
    values = np.load(io.BytesIO(base64.b64decode(answered["prompt_token_id_logprobs"])))
    rows = [
        None if row is None else {int(index): Logprob(**entry) for index, entry in row.items()}
        for row in answered["prompt_logprobs"]
    ]
    reply = GenerateTokensResponse(
        model="big", choices=[], prompt_logprobs=rows, prompt_token_id_logprobs=numpy2base64(values)
    )
    content = json.dumps(reply.model_dump()).encode()
    found = generate.rows_of(generate.decode_reply(content), work, V)
    (score,) = connect(fake, max_k=40).score([work])
    assert isinstance(score, ItemScore)
    np.testing.assert_array_equal(found.ids, score.topk_ids)
    np.testing.assert_array_equal(found.sampled, score.sampled_logprob)
