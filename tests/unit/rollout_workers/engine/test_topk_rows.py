"""Top-k rows of answers through vLLM's own output processor, against vLLM's own log-probs of the same outputs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams
from vllm.logprobs import FlatLogprobs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason, output_processor
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.outputs import LogprobsLists

from rollout_workers.engine import topk_rows
from rollout_workers.engine.topk_rows import TopKProcessor, TopKRows

VOCABULARY, K = 151_936, 256

Step = tuple[list[int], LogprobsLists]
"""Tokens of one engine step and their rows."""


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """`TopKProcessor` in vLLM's output processor, for one test."""
    monkeypatch.setattr(output_processor, "LogprobsProcessor", LogprobsProcessor)
    topk_rows.install()


def make_steps(sizes: Sequence[int], k: int = K, seed: int = 0) -> list[Step]:
    """Steps of `sizes` tokens, the sampled token's column first; arrays as a received message gives them."""
    rng = np.random.default_rng(seed)
    steps = []
    for size in sizes:
        ids = rng.integers(0, VOCABULARY, (size, k + 1), dtype=np.int32)
        logprobs = rng.standard_normal((size, k + 1), dtype=np.float32) - 9
        lists = LogprobsLists(ids, logprobs, rng.integers(1, k + 2, size, dtype=np.int32))
        for array in lists[:3]:
            array.flags.writeable = False
        steps.append((ids[:, 0].tolist(), lists))
    return steps


class FrontEnd:
    """vLLM's output processor without an engine: tests put in the outputs of engine steps."""

    def __init__(self) -> None:
        self.processor = OutputProcessor(None, log_stats=False)
        self.queues: dict[str, RequestOutputCollector] = {}

    def add(self, name: str, k: int = K, kind: RequestOutputKind = RequestOutputKind.FINAL_ONLY) -> None:
        params = SamplingParams(
            max_tokens=9999, logprobs=k, flat_logprobs=True, detokenize=False, output_kind=kind, prompt_logprobs=None
        )
        request = EngineCoreRequest(name, [1, 2, 3], None, params, None, 0.0, None, None, None, external_req_id=name)
        self.queues[name] = RequestOutputCollector(params.output_kind, name)
        self.processor.add_request(request, None, queue=self.queues[name])

    def step(self, name: str, step: Step, finish: FinishReason | None = None, version: str = "0") -> None:
        tokens, lists = step
        output = EngineCoreOutput(name, list(tokens), new_logprobs=lists, finish_reason=finish)
        self.processor.process_outputs([output], weight_version=version)

    def output(self, name: str) -> Any:
        """The request's output, None if there is none yet."""
        return self.queues[name].get_nowait()


def run(steps: Sequence[Step], finish: FinishReason = FinishReason.STOP, k: int = K) -> Any:
    """The completion of one answer made of `steps`."""
    front = FrontEnd()
    front.add("one", k)
    for number, step in enumerate(steps):
        front.step("one", step, finish if number == len(steps) - 1 else None)
    return front.output("one").outputs[0]


@pytest.mark.parametrize(("k", "width"), [(0, 0), (1, 1), (K, K), (0, K), (3, K)])
@pytest.mark.parametrize("sizes", [[1], [1] * 200, [3, 1, 2, 4]], ids=["one token", "200 tokens", "several a step"])
def test_ids_and_values_are_vllms_to_the_bit(
    k: int, width: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows have the `width` of the request with the most log-probs of the batch."""
    steps = make_steps(sizes, width)
    ours = run(steps, k=k)
    monkeypatch.setattr(output_processor, "LogprobsProcessor", LogprobsProcessor)
    theirs = run(steps, k=k)
    flat = theirs.logprobs
    assert isinstance(flat, FlatLogprobs)
    assert isinstance(ours.logprobs, TopKRows)
    assert ours.token_ids == theirs.token_ids
    sampled, topk = ours.logprobs.columns(ours.token_ids, k)
    assert (sampled.dtype, topk.dtype) == (np.float32, np.uint32)
    assert topk.flags.c_contiguous
    # FlatLogprobs: k + 1 entries a position, the sampled token's first; its Python floats are exact float32 values.
    assert np.asarray(flat.logprobs).reshape(-1, k + 1)[:, 0].tolist() == sampled.tolist()
    assert np.asarray(flat.token_ids).reshape(-1, k + 1)[:, 1:].tolist() == topk.tolist()


def test_answers_at_once_keep_their_own_rows() -> None:
    front = FrontEnd()
    steps = {name: make_steps([1] * length, seed=length) for name, length in (("a", 5), ("b", 90), ("c", 33))}
    for name in steps:
        front.add(name)
    for number in range(90):
        for name, own in steps.items():
            if number < len(own):
                front.step(name, own[number], FinishReason.LENGTH if number == len(own) - 1 else None)
    for name, own in steps.items():
        completion = front.output(name).outputs[0]
        sampled, topk = completion.logprobs.columns(completion.token_ids, K)
        assert topk.tolist() == [row for _, lists in own for row in lists.logprob_token_ids[:, 1:].tolist()]
        assert sampled.tolist() == [float(lists.logprobs[0, 0]) for _, lists in own]


def test_the_caller_wakes_once_and_gets_spans_of_both_versions() -> None:
    front = FrontEnd()
    front.add("one")
    steps = make_steps([1] * 6)
    for number, step in enumerate(steps):
        front.step("one", step, FinishReason.STOP if number == 5 else None, version="3" if number < 4 else "4")
        assert (front.queues["one"].output is None) == (number < 5)
    completion = front.output("one").outputs[0]
    assert [(span.start, span.version) for span in completion.weight_versions] == [(0, "3"), (4, "4")]
    assert len(completion.logprobs) == 6


@pytest.mark.parametrize("made", [0, 4])
def test_an_aborted_answer_has_the_rows_of_the_tokens_that_it_has(made: int) -> None:
    front = FrontEnd()
    front.add("one")
    for step in make_steps([1] * made):
        front.step("one", step)
    front.processor.abort_requests(["one"], internal=True)
    completion = front.output("one").outputs[0]
    assert completion.finish_reason == "abort"
    sampled, topk = completion.logprobs.columns(completion.token_ids, K)
    assert topk.shape == (made, K)
    assert len(sampled) == made


def test_rows_do_not_keep_received_messages() -> None:
    rows = TopKRows(2)
    ids, logprobs = np.array([[1, 2, 3]], np.int32), np.array([[-1.0, -2.0, -3.0]], np.float32)
    rows.append(ids, logprobs)
    ids[:], logprobs[:] = 9, 9  # vLLM receives the next message into the same memory
    sampled, topk = rows.columns([1], 2)
    assert (sampled.tolist(), topk.tolist()) == ([-1.0], [[2, 3]])


@pytest.mark.parametrize(
    ("tokens", "k", "message"),
    [
        ([7, 8], 2, "1 rows of 2 ids for 2 tokens of 2 ids"),
        ([], 2, "1 rows of 2 ids for 0 tokens of 2 ids"),
        ([7], 3, "1 rows of 2 ids for 1 tokens of 3 ids"),
        ([8], 2, "rows of other tokens"),
    ],
)
def test_rows_that_are_not_the_answers_are_refused(tokens: list[int], k: int, message: str) -> None:
    rows = TopKRows(2)
    rows.append(np.array([[7, 2, 3]], np.int32), np.array([[-1.0, -2.0, -3.0]], np.float32))
    with pytest.raises(ValueError, match=message):
        rows.columns(tokens, k)


def test_vllm_still_asks_the_class_that_is_replaced() -> None:
    """A vLLM that makes its processors elsewhere, or feeds them otherwise, fails here and at the first answer."""
    front = FrontEnd()
    front.add("one")
    state = front.processor.request_states["one"]
    assert type(state.logprobs_processor) is TopKProcessor
    assert "_update_sample_logprobs" in vars(LogprobsProcessor)


def test_prompt_logprobs_stay_vllms() -> None:
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False)
    request = EngineCoreRequest("p", [1, 2], None, params, None, 0.0, None, None, None, external_req_id="p")
    processor = TopKProcessor.from_new_request(None, request)
    assert isinstance(processor.prompt_logprobs, FlatLogprobs)
    assert processor.logprobs is None


async def test_the_engine_refuses_rows_that_are_not_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from common.config.model import SyncConfig
    from common.protocol.schema import Sampling
    from rollout_workers.engine.engine import RolloutEngine, RolloutError

    class Moved:
        """vLLM's client, if vLLM made its processors elsewhere."""

        model_config = None

        async def generate(self, *arguments: Any) -> Any:
            monkeypatch.setattr(output_processor, "LogprobsProcessor", LogprobsProcessor)
            yield type("Output", (), {"outputs": [run(make_steps([1, 1], 2), k=2)]})
            await asyncio.sleep(0)

    engine = RolloutEngine(Moved(), None, 256, SyncConfig())
    monkeypatch.setattr(engine, "_resolve_stops", lambda stop: type("Stops", (), {"token_ids": (), "spanning": ()}))
    monkeypatch.setattr(engine, "_end_ids", frozenset)
    with pytest.raises(RolloutError, match=r"moved: vLLM's log-probs do not fit its answer .*FlatLogprobs in place"):
        await engine.generate([1], Sampling(4, top_logprobs=2), "moved")
