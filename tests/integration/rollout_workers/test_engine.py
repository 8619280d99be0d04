"""A real vLLM engine against plain transformers: sampling, reported log-probs, weights after syncs."""

from __future__ import annotations

import asyncio
import copy
import os
import random
import signal
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.config.model import SyncConfig
from common.data.token_text import decode_ids
from common.protocol.schema import Sampling, TokenSequence, as_ids
from common.weight_sync.manifest import SyncManifest, TensorSpec
from learner.loop.parity import ParityError, ParityGate, parity_bounds
from learner.publishing.sender import Sender, open_sender
from rollout_workers.engine.engine import RolloutEngine, RolloutError
from rollout_workers.pool.failures import EngineLost
from tests.support.engines import PROMPT, K, run_config
from tests.support.processes import command_of, descendants
from tests.support.tiny import make_tokenizer

TOKENIZER = make_tokenizer()
BOUNDS = parity_bounds(SyncConfig(), "float32")


@dataclass
class Pair:
    """An engine and the model whose weights it is sent: the stand-in for the learner."""

    engine: RolloutEngine
    model: Any
    tied: bool
    version: int = 0
    sender: Sender | None = None

    def named(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.model.state_dict().items():
            if not (self.tied and name == "lm_head.weight"):
                yield name, tensor

    def manifest(self, bucket_bytes: int = 100_000) -> SyncManifest:
        return SyncManifest(
            tuple(TensorSpec(name, "float32", tuple(tensor.shape)) for name, tensor in self.named()), bucket_bytes
        )

    def train(self, lr: float) -> None:
        """One AdamW step on random tokens: moves every weight by about `lr`."""
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr)
        tokens = torch.randint(0, 256, (4, 24), generator=torch.Generator().manual_seed(self.version))
        self.model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        self.model.zero_grad()

    async def sync(self) -> None:
        self.version += 1
        assert self.sender is not None
        plan = self.manifest().at(self.version)
        sent = asyncio.to_thread(self.sender.send, list(self.named()), plan)
        await asyncio.gather(sent, self.engine.receive(plan, self.version))

    def logprobs(self, sequences: Sequence[TokenSequence]) -> list[np.ndarray[Any, Any]]:
        """Plain transformers: log-probs of the response tokens."""
        values = []
        for sequence in sequences:
            response = torch.tensor(sequence.response_ids.astype(np.int64))
            logits = self.logits(sequence.prompt_ids.tolist(), sequence.response_ids.tolist())
            values.append(logits.log_softmax(-1).gather(1, response[:, None])[:, 0].numpy())
        return values

    def logits(self, prompt: list[int], response: list[int]) -> Tensor:
        """``[T, V]``: row t predicts response[t]."""
        with torch.no_grad():
            logits: Tensor = self.model(torch.tensor([prompt + response])).logits[0]
        return logits[len(prompt) - 1 : -1].float()


@pytest.fixture(scope="module", params=["tied", "untied"])
async def pair(request: pytest.FixtureRequest, tiny_model: Path, tiny_untied_model: Path) -> AsyncIterator[Pair]:
    from transformers import AutoModelForCausalLM

    folder = tiny_model if request.param == "tied" else tiny_untied_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # lets a test reach into the worker
        engine = await RolloutEngine.start(str(folder), run_config(folder), max_logprobs=K)
        pair = Pair(engine, AutoModelForCausalLM.from_pretrained(folder), tied=request.param == "tied")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        sender, _ = await asyncio.gather(
            asyncio.to_thread(open_sender, SyncConfig(timeout_s=60), "127.0.0.1", port, 2),
            engine.join_sync("127.0.0.1", port, 1, 2),
        )
        pair.sender = sender
        yield pair
        engine.close()


async def probe_of(pair: Pair) -> list[TokenSequence]:
    answers = await asyncio.gather(
        *(pair.engine.generate(PROMPT[: 4 + i], Sampling(max_tokens=24, seed=i), f"probe{i}") for i in range(5))
    )
    return [TokenSequence(as_ids(PROMPT[: 4 + i]), answer.response_ids) for i, answer in enumerate(answers)]


def is_plain(text: str) -> bool:
    """One ASCII character: neither half of a longer one nor an id that the tokenizer does not have."""
    return len(text) == 1 and text.isascii()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
async def test_reported_logprobs_are_at_the_sampling_temperature_and_position(pair: Pair, temperature: float) -> None:
    answer = await pair.engine.generate(PROMPT, Sampling(40, temperature, top_logprobs=K, seed=1), f"t{temperature}")
    ids = answer.response_ids.tolist()
    expected = (pair.logits(PROMPT, ids) / temperature).log_softmax(-1)
    sampled = expected.gather(1, torch.tensor(ids)[:, None])[:, 0].numpy()
    assert np.abs(answer.sampled_logprobs - sampled).max() < 1e-4
    assert np.abs(answer.sampled_logprobs[1:] - sampled[:-1]).max() > 0.1  # a shift by one is far off


async def test_topk_ids_are_the_students_own_best_first_without_the_sampled_column(pair: Pair) -> None:
    answer = await pair.engine.generate(PROMPT, Sampling(60, 1.5, top_logprobs=K, seed=2), "topk")
    logits = pair.logits(PROMPT, answer.response_ids.tolist())
    assert answer.topk_ids.shape == (len(answer.response_ids), K)
    assert (logits.topk(K).indices.numpy() == answer.topk_ids).mean() > 0.99  # near-ties may swap
    outside = [token not in row for token, row in zip(answer.response_ids, answer.topk_ids, strict=True)]
    assert any(outside)  # at this temperature some samples lie outside the top k: no column was theirs


async def test_topk_rows_are_vllms_own_logprobs_to_the_bit(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import SamplingParams
    from vllm.v1.engine import output_processor
    from vllm.v1.engine.logprobs import LogprobsProcessor

    answers = await asyncio.gather(
        *(pair.engine.generate(PROMPT, Sampling(50, 1.5, top_logprobs=K, seed=n), f"ours{n}") for n in range(4))
    )
    monkeypatch.setattr(output_processor, "LogprobsProcessor", LogprobsProcessor)

    async def flat(seed: int) -> Any:
        params = SamplingParams(
            max_tokens=50,
            temperature=1.5,
            seed=seed,
            logprobs=K,
            flat_logprobs=True,
            detokenize=False,
            stop_token_ids=sorted(pair.engine._end_ids()),
        )
        async for output in pair.engine._engine.generate({"prompt_token_ids": PROMPT}, params, f"theirs{seed}"):
            last = output.outputs[0]
        return last

    for answer, theirs in zip(answers, await asyncio.gather(*map(flat, range(4))), strict=True):
        assert answer.response_ids.tolist() == list(theirs.token_ids)
        tokens = len(theirs.token_ids)
        assert np.array_equal(np.reshape(theirs.logprobs.token_ids, (tokens, K + 1))[:, 1:], answer.topk_ids)
        assert np.array_equal(np.reshape(theirs.logprobs.logprobs, (tokens, K + 1))[:, 0], answer.sampled_logprobs)


async def test_a_cancelled_answer_leaves_nothing_and_the_engine_goes_on(pair: Pair) -> None:
    flying = asyncio.create_task(pair.engine.generate(PROMPT, Sampling(400, top_logprobs=K, seed=5), "cancelled"))
    await has_tokens(pair.engine, 5)
    flying.cancel()
    with pytest.raises(asyncio.CancelledError):
        await flying
    assert not pair.engine._engine.output_processor.request_states
    answer = await pair.engine.generate(PROMPT, Sampling(8, 0.0, top_logprobs=K), "next")
    assert answer.topk_ids.shape == (8, K)


async def test_an_answer_that_the_engine_aborts_is_an_error(pair: Pair) -> None:
    flying = asyncio.create_task(pair.engine.generate(PROMPT, Sampling(400, top_logprobs=K, seed=5), "aborted"))
    await has_tokens(pair.engine, 5)
    await pair.engine._engine.abort("aborted")
    with pytest.raises(RolloutError, match="aborted: the engine ended the answer with 'abort'"):
        await flying


async def test_greedy_is_the_argmax(pair: Pair) -> None:
    answer = await pair.engine.generate(PROMPT, Sampling(20, 0.0), "greedy")
    ids = answer.response_ids.tolist()
    assert pair.logits(PROMPT, ids).argmax(-1).tolist() == ids
    assert answer.topk_ids.shape == (20, 0)


async def test_a_stop_string_ends_the_answer_and_belongs_to_it(pair: Pair) -> None:
    free = await pair.engine.generate(PROMPT, Sampling(60, 1.0, top_logprobs=4, seed=3), "free")
    texts = [decode_ids(TOKENIZER, [token]) for token in free.response_ids.tolist()]
    place, stop = next((i, text) for i, text in enumerate(texts) if i > 5 and is_plain(text) and text not in texts[:i])
    stopped = await pair.engine.generate(PROMPT, Sampling(60, 1.0, top_logprobs=4, stop=(stop,), seed=3), "stopped")
    assert stopped.response_ids.tolist() == free.response_ids.tolist()[: place + 1]
    assert stopped.finish_reason == "stop"
    assert free.finish_reason == "length"
    assert len(stopped.sampled_logprobs) == len(stopped.topk_ids) == place + 1


async def test_a_stop_that_spans_tokens_cuts_after_the_token_that_completes_it(pair: Pair) -> None:
    free = await pair.engine.generate(PROMPT, Sampling(60, 1.0, top_logprobs=4, seed=3), "free2")
    texts = [decode_ids(TOKENIZER, [token]) for token in free.response_ids.tolist()]
    place = next(i for i in range(5, 59) if is_plain(texts[i]) and is_plain(texts[i + 1]))
    stop = texts[place] + texts[place + 1]
    whole = decode_ids(TOKENIZER, free.response_ids.tolist())
    stopped = await pair.engine.generate(PROMPT, Sampling(60, 1.0, top_logprobs=4, stop=(stop,), seed=3), "stopped2")
    assert stopped.finish_reason == "stop"
    assert decode_ids(TOKENIZER, stopped.response_ids.tolist()) == whole[: whole.index(stop) + len(stop)]
    assert len(stopped.sampled_logprobs) == len(stopped.topk_ids) == len(stopped.response_ids)


async def test_a_seed_gives_the_same_answer_whatever_runs_beside_it(pair: Pair) -> None:
    alone = await pair.engine.generate(PROMPT, Sampling(20, 1.0, seed=7), "alone")
    crowd = await asyncio.gather(
        *(pair.engine.generate(PROMPT, Sampling(20, 1.0, seed=seed), f"crowd{seed}") for seed in range(8))
    )
    assert crowd[7].response_ids.tolist() == alone.response_ids.tolist()
    assert len({tuple(answer.response_ids.tolist()) for answer in crowd}) == 8


async def test_more_prompts_than_one_pass_takes_get_the_answers_that_each_gets_alone(pair: Pair) -> None:
    """vLLM cuts the last prompt of a full pass; with a seed that kills its engine on CPU."""
    rng = random.Random(0)
    prompts = [[rng.randrange(256) for _ in range(200)] for _ in range(48)]
    together = await asyncio.gather(
        *(pair.engine.generate(prompt, Sampling(8, 1.0, seed=n), f"many{n}") for n, prompt in enumerate(prompts))
    )
    for n in (0, 9, 10, 11, 20, 47):
        alone = await pair.engine.generate(prompts[n], Sampling(8, 1.0, seed=n), f"one{n}")
        assert together[n].response_ids.tolist() == alone.response_ids.tolist()


async def test_a_prompt_that_leaves_no_room_is_refused_with_the_numbers(pair: Pair) -> None:
    with pytest.raises(RolloutError, match=r"long: 506 prompt tokens \+ 7 of answer are 513, the engine takes 512"):
        await pair.engine.generate([5] * 506, Sampling(7), "long")


async def test_engine_follows_the_learner_through_three_syncs(pair: Pair) -> None:
    probe = await probe_of(pair)
    gate = ParityGate(BOUNDS)
    gate.begin(await pair.engine.logprobs(probe), pair.logprobs(probe))
    before = pair.logprobs(probe)
    for _ in range(3):
        pair.train(lr=1e-3)
        await pair.sync()
        report = gate.check(pair.version, await pair.engine.logprobs(probe), pair.logprobs(probe))
        assert report.max_nats < 2e-4
    moved = max(np.abs(old - new).max() for old, new in zip(before, pair.logprobs(probe), strict=True))
    assert moved > 0.01  # the syncs had something to carry
    answer = await pair.engine.generate(PROMPT, Sampling(8, 0.0), "after")
    assert answer.versions == ((0, pair.version),)
    assert pair.logits(PROMPT, answer.response_ids.tolist()).argmax(-1).tolist() == answer.response_ids.tolist()


async def has_tokens(engine: RolloutEngine, tokens: int) -> None:
    """Return when the only answer in flight has `tokens` tokens."""
    states = engine._engine.output_processor.request_states
    while not any(state.detokenizer.num_output_tokens() >= tokens for state in states.values()):  # noqa: ASYNC110
        await asyncio.sleep(0.001)  # vLLM has no event for it


async def test_an_answer_in_flight_across_a_sync_has_a_span_of_each_version(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It pauses and continues with the new weights; later requests see no trace of the old ones."""
    long = PROMPT * 15  # more than the 128 tokens that a block of the prefix cache has on CPU
    before = await pair.engine.generate(long, Sampling(8, 0.0), "fills the prefix cache")
    old = copy.deepcopy(pair.model)
    generate = pair.engine._engine.generate
    cached: dict[str, int] = {}

    async def watched(*arguments: Any) -> AsyncIterator[Any]:
        async for output in generate(*arguments):
            cached[output.request_id] = output.num_cached_tokens
            yield output

    monkeypatch.setattr(pair.engine._engine, "generate", watched)
    flying = asyncio.create_task(pair.engine.generate(long, Sampling(200, 1.0, top_logprobs=K, seed=3), "flying"))
    pair.train(lr=1e-2)
    await has_tokens(pair.engine, 5)
    await pair.sync()
    answer = await flying
    (first, version), (turn, next_version) = answer.versions
    assert (first, version, next_version) == (0, pair.version - 1, pair.version)
    assert 5 <= turn < len(answer.response_ids) == 200
    assert cached["flying"] == 128

    ids = answer.response_ids.tolist()
    new, pair.model = pair.model, old
    by_old = pair.logits(long, ids).log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0].numpy()
    pair.model = new
    difference = np.abs(answer.sampled_logprobs - by_old)
    assert difference[:turn].max() < 1e-4
    assert difference[turn] > 1e-3  # of its first token under the new weights
    assert np.median(difference[turn:]) > 0.01

    after = await pair.engine.generate(long, Sampling(8, 0.0), "after")
    assert after.versions == ((0, pair.version),)
    ids = after.response_ids.tolist()
    expected = pair.logits(long, ids).log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0].numpy()
    assert np.abs(after.sampled_logprobs - expected).max() < 1e-4  # a stale prefix would show
    assert np.abs(before.sampled_logprobs - after.sampled_logprobs).max() > 1e-3


def leave_output_layer_stale(worker: Any) -> None:
    from rollout_workers.vllm_plugin.packed_copies import PackedCopies

    PackedCopies.renewed = PackedCopies.renew  # type: ignore[attr-defined]
    PackedCopies.renew = lambda self: None  # type: ignore[method-assign]


def mend_output_layer(worker: Any) -> None:
    from rollout_workers.vllm_plugin.packed_copies import PackedCopies

    PackedCopies.renew = PackedCopies.renewed  # type: ignore[attr-defined,method-assign]


@pytest.mark.parametrize(("lr", "why"), [(1e-3, "differ by"), (1e-6, "left with old weights")])
async def test_the_gate_fails_when_the_output_layer_is_left_stale(pair: Pair, lr: float, why: str) -> None:
    """An untied output layer is packed when it is loaded: there the whole sync is left out instead."""
    probe = await probe_of(pair)
    gate = ParityGate(BOUNDS)
    gate.begin(await pair.engine.logprobs(probe), pair.logprobs(probe))
    if pair.tied:
        await pair.engine._engine.collective_rpc(leave_output_layer_stale)
    try:
        pair.train(lr)
        if pair.tied:
            await pair.sync()
        with pytest.raises(ParityError, match=why if pair.tied else "differ by|left with old weights"):
            gate.check(pair.version, await pair.engine.logprobs(probe), pair.logprobs(probe))
    finally:
        if pair.tied:
            await pair.engine._engine.collective_rpc(mend_output_layer)
        await pair.sync()


# --- loading --------------------------------------------------------------------------------------------------------


ENGINE_NAMES = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}


async def test_a_weight_that_does_not_arrive_is_named_whichever_it_is(pair: Pair) -> None:
    whole = pair.named
    for left_out in dict(whole()):
        pair.named = lambda: ((name, tensor) for name, tensor in whole() if name != left_out)  # noqa: B023
        *_, module, leaf = left_out.split(".")
        expected = rf"did not write all .*{ENGINE_NAMES.get(module, module)}\.{leaf} \([\d,]+ of [\d,]+ elements\)"
        with pytest.raises(Exception, match=expected):
            await pair.sync()
    pair.named = whole
    await pair.sync()  # until then nothing is answered
    await follows(pair)


def copy_directly(worker: Any, copied: str) -> None:
    """Load one weight as vLLM's GPT-OSS loads its sinks: by a copy into the parameter."""
    model = worker.weight_transfer_engine.model
    original = model.load_weights

    def load_weights(weights: Any) -> Any:
        def others() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                if name == copied:
                    model.get_parameter(name).copy_(tensor)
                else:
                    yield name, tensor

        return original(others())

    model.load_weights = load_weights


def load_normally(worker: Any) -> None:
    del worker.weight_transfer_engine.model.load_weights


async def test_a_weight_that_the_engine_copies_past_its_loader_arrives(pair: Pair) -> None:
    await pair.engine._engine.collective_rpc(copy_directly, args=("model.layers.1.input_layernorm.weight",))
    try:
        pair.train(1e-2)
        await pair.sync()
    finally:
        await pair.engine._engine.collective_rpc(load_normally)
    await follows(pair)


async def test_such_a_weight_that_is_packed_after_loading_is_named(pair: Pair) -> None:
    await pair.engine._engine.collective_rpc(copy_directly, args=("model.layers.1.mlp.down_proj.weight",))
    try:
        with pytest.raises(Exception, match=r"model\.layers\.1\.mlp\.down_proj\.weight \(0 of [\d,]+ elements\) would"):
            await pair.sync()
    finally:
        await pair.engine._engine.collective_rpc(load_normally)
    await pair.sync()
    await follows(pair)


# --- other groups, other transports ---------------------------------------------------------------------------------


async def join_anew(pair: Pair, sync: SyncConfig) -> None:
    """Sender and engine leave their group and form another."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    if pair.sender is not None:
        pair.sender.close()
    pair.engine._sync = sync
    pair.sender, _ = await asyncio.gather(
        asyncio.to_thread(open_sender, sync, "127.0.0.1", port, 2), pair.engine.join_sync("127.0.0.1", port, 1, 2)
    )


async def follows(pair: Pair) -> None:
    """Assert that the engine has the model's new weights, not its old ones."""
    probe = await probe_of(pair)
    before = pair.logprobs(probe)
    pair.train(lr=1e-3)
    await pair.sync()
    engine, model = await pair.engine.logprobs(probe), pair.logprobs(probe)
    assert max(np.abs(a - b).max() for a, b in zip(engine, model, strict=True)) < 2e-4
    assert max(np.abs(a - b).max() for a, b in zip(before, model, strict=True)) > 0.005


@pytest.mark.parametrize("transport", ["gloo", "file", "delta"])
async def test_an_engine_joins_again_and_follows_over_every_transport(
    pair: Pair, transport: str, tmp_path: Path
) -> None:
    settings = {
        "gloo": {},
        "file": {"backend": "file", "folder": tmp_path},
        "delta": {"delta": True},
    }[transport]
    await join_anew(pair, SyncConfig(timeout_s=60, **settings))
    for _ in range(2):
        await follows(pair)


async def test_an_engine_that_hangs_does_not_pass_for_healthy(pair: Pair) -> None:
    await pair.engine.check_health()
    core = {pid for pid in descendants(os.getpid()) if command_of(pid).startswith("VLLM::EngineCore")}
    (process,) = core
    os.kill(process, signal.SIGSTOP)
    try:
        call = asyncio.create_task(pair.engine.check_health())
        done, _ = await asyncio.wait({call}, timeout=3)
        assert not done
    finally:
        os.kill(process, signal.SIGCONT)
    await call


class Silent:
    """vLLM's client when its engine's process dies during a control call: the call is never answered."""

    def __init__(self) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        self.errored = False
        self.dead_error = EngineDeadError()
        self.asked = asyncio.Event()

    async def check_health(self) -> None:
        self.asked.set()
        await asyncio.Event().wait()


async def test_an_engine_that_dies_in_a_control_call_is_noticed() -> None:
    silent = Silent()
    engine = RolloutEngine(silent, None, 256, SyncConfig())
    call = asyncio.create_task(engine.check_health())
    await silent.asked.wait()
    done, _ = await asyncio.wait({call}, timeout=1.5)
    assert not done  # it may take as long as it likes while the engine lives
    silent.errored = True
    with pytest.raises(EngineLost):
        await call


async def test_a_nucleus_does_not_touch_the_students_ids(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = run_config(tiny_model)
    config = config.model_copy(update={"rollout": config.rollout.model_copy(update={"top_p": 0.1})})
    engine = await RolloutEngine.start(str(tiny_model), config, max_logprobs=K)
    try:
        answer = await engine.generate(PROMPT, Sampling(40, 0.7, top_p=0.1, top_logprobs=K, seed=1), "nucleus")
    finally:
        engine.close()
    pair = Pair(engine, AutoModelForCausalLM.from_pretrained(tiny_model), tied=True)
    ids = answer.response_ids.tolist()
    logits = pair.logits(PROMPT, ids)
    assert (logits.topk(K).indices.numpy() == answer.topk_ids).mean() > 0.99  # near-ties may swap
    sampled = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0].numpy()
    assert np.abs(answer.sampled_logprobs - sampled).max() < 1e-4
