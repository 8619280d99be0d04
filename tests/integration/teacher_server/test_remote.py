"""The remote backend in front of a real ``vllm serve`` on CPU, through our HTTP server, against transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from common.config.model import TeacherConfig
from common.protocol.codec import decode_response
from common.protocol.schema import ItemScore, ScoreItem, ScoreMode
from common.protocol.scoring import TeacherError
from teacher_server.backends.remote.prompt_rows import MASS_ERROR
from teacher_server.client.handshake import handshake
from teacher_server.http.serve import build_service
from tests.support.teacher_oracle import Oracle, assert_score
from tests.support.teacher_running import Running, items, post, put, request_of, running, tokens
from tests.support.vllm_server import vllm_server

KEY = "key-of-the-endpoint"


@pytest.fixture(scope="module")
def endpoint(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("endpoint") / "log"
    arguments = ["--max-logprobs", "512", "--api-key", KEY, "--served-model-name", "big", "--enable-scale-out"]
    arguments += ["--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", str(64 << 20)]
    arguments += ["--max-num-batched-tokens", "256"]  # prompts above it take several steps
    with vllm_server(tiny_model, log, *arguments) as url:
        yield url


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "key"
    path.write_text(f"{KEY}\n")
    return path


@pytest.fixture(scope="module")
def teacher(tiny_model: Path, endpoint: str, key_file: Path) -> Iterator[Running]:
    settings = {"backend": "remote", "endpoint": f"{endpoint}/v1", "endpoint_key_file": key_file}
    with running(tiny_model, dtype="float32", max_k=512, **settings) as server:
        yield server


@pytest.fixture(scope="module")
def oracle(tiny_model: Path) -> Oracle:
    return Oracle.load(tiny_model)


def bare(batch: list[ScoreItem]) -> list[ScoreItem]:
    """The items without a support."""
    return [ScoreItem(item.context, item.prompt_ids, item.response_ids) for item in batch]


@pytest.mark.parametrize(("mode", "k"), [("teacher_topk", 8), ("teacher_topk", 512), ("sampled", 0)])
async def test_scores_are_those_of_a_plain_forward_pass(
    teacher: Running, oracle: Oracle, mode: ScoreMode, k: int
) -> None:
    """Two rounds: the endpoint's prefix cache then holds every prompt. The context takes two engine steps."""
    context = teacher.context(tokens(11, 300))
    batch = bare([*items(21, 3, context=context.hash), *items(22, 2), *items(23, 1, prompt=0, context=context.hash)])
    async with teacher.http() as http:
        http.timeout = 600  # rows of whole vocabularies on a slow machine
        assert (await put(http, context)).status_code == 200
        for _ in range(2):
            reply = await post(http, request_of(batch, mode=mode, k=k))
            assert reply.status_code == 200, reply.text
            for item, score in zip(batch, decode_response(reply.content).results, strict=True):
                assert isinstance(score, ItemScore), score
                before = context.ids if item.context else tokens(0, 0)
                assert_score(score, oracle.logprobs(before, item.prompt_ids, item.response_ids), item, score.topk_ids)


async def test_the_mass_of_a_tail_is_known_to_its_bound(teacher: Running, oracle: Oracle) -> None:
    """The more ids are inside, the smaller the tail, down to 1e-9; the error of its mass stays the same."""
    (item,) = bare(items(31, 1, response=200))
    exact = np.sort(oracle.logprobs(tokens(0, 0), item.prompt_ids, item.response_ids).exp().numpy(), axis=1)
    async with teacher.http() as http:
        http.timeout = 600  # rows of whole vocabularies on a slow machine
        for k in (8, 64, 256, 480, 505, 511):
            reply = await post(http, request_of([item], mode="teacher_topk", k=k))
            (score,) = decode_response(reply.content).results
            assert isinstance(score, ItemScore), score
            error = np.exp(score.tail_logprob.astype(np.float64)) - exact[:, :-k].sum(axis=1)
            assert np.abs(error).max() < MASS_ERROR


def test_the_handshake_states_what_the_endpoint_can_do(teacher: Running, tiny_model: Path) -> None:
    """The route for given ids is there, and refuses them: vLLM's CPU build has the V1 model runner."""
    info = teacher.info
    assert info.modes == {"teacher_topk": (1.0,), "sampled": (1.0,)}
    assert (info.backend, info.path, info.model, info.dtype) == ("remote", "full", str(tiny_model), "float32")
    assert (info.vocab_size, info.max_k, info.max_sequence_tokens) == (512, 512, 4095)


def test_a_loss_that_needs_given_ids_is_refused_with_a_remedy(teacher: Running) -> None:
    with pytest.raises(TeacherError, match=r"cannot score in mode at_ids .*--enable-scale-out, or set loss.support to"):
        handshake(
            teacher.info,
            tokenizer_fingerprint=teacher.info.tokenizer_fingerprint,
            added_tokens=teacher.info.added_tokens,
            k=8,
            mode="at_ids",
            temperature=1.0,
            longest_tokens=100,
        )


def test_the_longest_sequence_is_scored(teacher: Running) -> None:
    """One token more would leave no room for the token that vLLM generates."""
    model = teacher.gate._model
    sequence = tokens(41, teacher.info.max_sequence_tokens)
    rows, settings = model.rows(sequence, tokens=3, k=1)
    assert rows.sampled.shape == (3,)
    assert settings.startswith("vllm-")


def test_a_wrong_key_and_a_missing_one_end_the_start(endpoint: str, tiny_model: Path, tmp_path: Path) -> None:
    settings = {"model": str(tiny_model), "backend": "remote", "endpoint": endpoint}
    with pytest.raises(
        TeacherError, match=rf"the endpoint {endpoint} wants a key, set teacher.endpoint_key_file \(HTTP 401"
    ):
        build_service(TeacherConfig(**settings))
    wrong = tmp_path / "key"
    wrong.write_text("secret")
    with pytest.raises(TeacherError, match=rf"refuses the key in teacher.endpoint_key_file {wrong}") as caught:
        build_service(TeacherConfig(**settings, endpoint_key_file=wrong))
    assert "secret" not in str(caught.value)


def test_the_tokenizer_of_another_model_ends_the_start(
    endpoint: str, key_file: Path, tiny_model: Path, tmp_path: Path
) -> None:
    for path in tiny_model.iterdir():
        text = path.read_bytes()
        if path.name == "tokenizer.json":
            text = text.replace(b'"a": ', b'"held": ').replace(b'"b": ', b'"a": ').replace(b'"held": ', b'"b": ')
        if path.suffix == ".json":
            (tmp_path / path.name).write_bytes(text)
    config = TeacherConfig(model=str(tmp_path), backend="remote", endpoint=endpoint, endpoint_key_file=key_file)
    with pytest.raises(TeacherError, match=r"another tokenizer than teacher.model"):
        build_service(config)
