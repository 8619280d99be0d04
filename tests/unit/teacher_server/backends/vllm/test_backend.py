"""The vLLM backend without an engine: requests, validation of results, and the calls into the installed vLLM."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from common.config.model import TeacherConfig
from common.protocol.schema import LOGPROB_FLOOR, Ids, ItemError, ItemScore, ScoreItem, ScoreMode, as_ids
from teacher_server.backends.base import Work
from teacher_server.backends.vllm.backend import VllmBackend
from teacher_server.backends.vllm.engine import EngineRequest, engine_settings
from teacher_server.backends.vllm.files import weights_fingerprint
from teacher_server.backends.vllm.worker import fixed_id_rows, top_k_rows
from tests.support.teacher_oracle import assert_score, random_item

V = 64
MODES: tuple[ScoreMode, ...] = ("at_ids", "teacher_topk", "union", "sampled")


@dataclass
class FakeEngine:
    """Answers as a vLLM with the replaced functions: logits are a function of all tokens up to the position.

    `damage` changes the first `faults` outputs.
    """

    fixed_ids: bool = True
    damage: Any = None
    faults: int = 0
    block_tokens: int = 4
    cache_tokens: int = 10_000
    vocab_size: int = V
    max_sequence_tokens: int = 512
    token_bytes: int = 2
    dtype: str = "float32"
    calls: list[list[EngineRequest]] = field(default_factory=list)

    def run(self, requests: list[EngineRequest], temperature: float = 1.0) -> list[Any]:
        self.calls.append(list(requests))
        return [self._answer(ask, temperature) for ask in requests]

    def _answer(self, ask: EngineRequest, temperature: float) -> Any:
        rows = logits_of(as_ids(ask.ids))
        output = SimpleNamespace(num_cached_tokens=0, prompt_token_id_logprobs=None, prompt_logprobs=None)
        if ask.fixed_ids is not None:
            wanted = torch.from_numpy(ask.fixed_ids.astype(np.int64))
            output.prompt_token_id_logprobs = fixed_id_rows(
                rows[ask.start : -1], wanted, temperature=temperature
            ).numpy()
        if ask.top_k_columns is not None:
            output.prompt_logprobs = flat(rows[:-1], as_ids(ask.ids), ask.top_k_columns, temperature)
        if self.faults and (ask.fixed_ids is not None or ask.top_k_columns is not None):
            self.faults -= 1
            self.damage(output)
        return output


def logits_of(ids: Ids) -> torch.Tensor:
    """``[N, V]``: logits of each position, from a seed of all tokens up to it."""
    rows = []
    for stop in range(1, ids.size + 1):
        seed = int.from_bytes(ids[:stop].tobytes(), "little") % (2**63 - 1)
        rows.append(torch.randn(V, generator=torch.Generator().manual_seed(seed)) * 4)
    return torch.stack(rows)


def flat(rows: torch.Tensor, ids: Ids, columns: int, temperature: float) -> Any:
    """vLLM's own container, filled as its V1 runner and its output processor do."""
    from vllm.logprobs import FlatLogprobs

    following = torch.from_numpy(ids[1:].astype(np.int64))
    tensors = top_k_rows(rows.log_softmax(-1), columns, following, temperature=temperature)
    filled = FlatLogprobs()
    filled.append(None)
    for row_ids, row in zip(tensors.logprob_token_ids.tolist(), tensors.logprobs.tolist(), strict=True):
        filled.append_fast(row_ids, row, iter(range(columns + 1)), [None] * (columns + 1))
    return filled


def backend_of(engine: FakeEngine) -> VllmBackend:
    return VllmBackend(engine, model_name="fake", fingerprint="0" * 64)


def work_of(
    mode: ScoreMode, *, seed: int = 0, prefix: Any = None, k: int = 5, response: int = 7, temperature: float = 1.0
) -> Work:
    item = random_item(np.random.default_rng(seed), prompt=3, response=response, k=6, vocabulary=V)
    if mode in ("teacher_topk", "sampled"):
        item = ScoreItem(item.context, item.prompt_ids, item.response_ids)
    return Work(item, prefix, mode, temperature, k)


def expected(work: Work) -> torch.Tensor:
    before = as_ids([]) if work.prefix is None else work.prefix.ids
    ids = np.concatenate([before, work.item.prompt_ids, work.item.response_ids])
    logits = logits_of(ids)[-work.item.response_ids.size - 1 : -1].double()
    return (logits / work.temperature).log_softmax(-1)


# --- scores ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_fixed_id_rows_are_the_full_distribution_with_its_tail(mode: ScoreMode) -> None:
    backend = backend_of(FakeEngine())
    (prefix,) = backend.prefill([as_ids(range(10))], None)
    batch = [work_of(mode, seed=seed, prefix=prefix if seed % 2 else None) for seed in range(4)]
    for work, score in zip(batch, backend.score(batch), strict=True):
        assert isinstance(score, ItemScore)
        assert_score(score, expected(work), work.item, score.topk_ids)
        assert score.floored == 0
        assert (score.topk_ids is not None) == (mode in ("teacher_topk", "union"))


@pytest.mark.parametrize("mode", ["teacher_topk", "sampled"])
def test_top_k_rows_are_the_full_distribution_with_its_tail(mode: ScoreMode) -> None:
    backend = backend_of(FakeEngine(fixed_ids=False))
    assert set(backend.modes) == {"teacher_topk", "sampled"}
    (prefix,) = backend.prefill([as_ids(range(10))], None)
    for work in (work_of(mode), work_of(mode, seed=1, prefix=prefix), work_of(mode, seed=2, k=V)):
        (score,) = backend.score([work])
        assert isinstance(score, ItemScore)
        assert_score(score, expected(work), work.item, score.topk_ids)


@pytest.mark.parametrize("fixed_ids", [True, False])
def test_a_batch_of_several_temperatures(fixed_ids: bool) -> None:
    """The engine scores at one temperature at a time; the results keep the order of the batch."""
    engine = FakeEngine(fixed_ids=fixed_ids)
    backend = backend_of(engine)
    batch = [
        work_of(mode, seed=seed, temperature=temperature)
        for mode in backend.modes
        for seed, temperature in enumerate((0.25, 1.0, 3.0, 0.25))
    ]
    for work, score in zip(batch, backend.score(batch), strict=True):
        assert isinstance(score, ItemScore)
        assert_score(score, expected(work), work.item, score.topk_ids)
    modes = len(backend.modes)
    assert [len(requests) for requests in engine.calls] == [2 * modes, modes, modes]


def test_a_tail_that_f32_sums_would_lose_is_kept() -> None:
    """1e-9 of mass outside: 1 - sum is 0 or noise in f32."""
    logits = torch.zeros(1, V)
    logits[0, 0] = 25.0
    row = fixed_id_rows(logits, torch.tensor([[0, 0, 0]]))[0]
    exact = logits[0, 1:].double().logsumexp(0) - logits[0].double().logsumexp(0)
    assert abs(float(row[1]) - float(exact)) < 1e-5
    tensors = top_k_rows(logits.log_softmax(-1), 2, torch.tensor([0]))
    assert abs(float(tensors.logprobs[0, -1]) - float(exact)) < 1e-5


@pytest.mark.parametrize("mode", ["at_ids", "union"])
def test_ids_that_the_model_lacks_get_the_floor(mode: ScoreMode) -> None:
    work = work_of(mode)
    assert work.item.topk_ids is not None
    work.item.topk_ids[2, :3] = [V, V + 7, 2 * V]
    (score,) = backend_of(FakeEngine()).score([work])
    assert isinstance(score, ItemScore)
    assert (score.logprobs[2, :3] == LOGPROB_FLOOR).all()
    assert_score(score, expected(work), work.item, score.topk_ids)
    assert score.floored == 3


def test_unscorable_supports_are_errors_of_their_item() -> None:
    twice, none, whole = work_of("at_ids"), work_of("at_ids", seed=1), work_of("at_ids", seed=2)
    assert twice.item.topk_ids is not None
    assert none.item.topk_ids is not None
    twice.item.topk_ids[4, 1] = twice.item.topk_ids[4, 0]
    none.item.topk_ids[3] = V + np.arange(6)
    results = backend_of(FakeEngine()).score([twice, none, whole])
    assert [getattr(result, "code", "scored") for result in results] == ["bad_ids", "bad_ids", "scored"]
    assert "position 4" in results[0].message
    assert "position 3" in results[1].message


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_response_has_no_rows(mode: ScoreMode) -> None:
    engine = FakeEngine()
    (score,) = backend_of(engine).score([work_of(mode, response=0)])
    assert isinstance(score, ItemScore)
    width = {"at_ids": 6, "teacher_topk": 5, "union": 11, "sampled": 0}[mode]
    assert score.logprobs.shape == (0, width)
    assert not engine.calls


# --- invalid results -----------------------------------------------------------------------------------------------


def drop(output: Any) -> None:
    output.prompt_token_id_logprobs = output.prompt_logprobs = None


def cached_too_far(output: Any) -> None:
    output.num_cached_tokens = 13


def _values(output: Any) -> Any:
    return output.prompt_token_id_logprobs


def short(output: Any) -> None:
    output.prompt_token_id_logprobs = _values(output)[1:]


def unwritten(output: Any) -> None:
    _values(output)[3] = np.nan


def zeros(output: Any) -> None:
    _values(output)[3] = 0.0


def positive(output: Any) -> None:
    _values(output)[3, 0] = 2.0


def another_value(output: Any) -> None:
    _values(output)[2, 2] = -0.1


def tail_of_another_row(output: Any) -> None:
    _values(output)[2, 1] = -40.0


FAULTS = [drop, cached_too_far, short, unwritten, zeros, positive, another_value, tail_of_another_row]


@pytest.mark.parametrize("damage", FAULTS)
def test_an_invalid_result_is_requested_again_without_the_cache(damage: Any) -> None:
    engine = FakeEngine(damage=damage, faults=1)
    backend = backend_of(engine)
    (prefix,) = backend.prefill([as_ids(range(10))], None)
    batch = [work_of("at_ids", seed=seed, prefix=prefix) for seed in range(3)]
    for work, score in zip(batch, backend.score(batch), strict=True):
        assert isinstance(score, ItemScore)
        assert_score(score, expected(work), work.item)
    (again,) = engine.calls[-1]
    assert again.salt is None


@pytest.mark.parametrize("damage", FAULTS)
def test_a_result_that_is_invalid_twice_is_an_error_of_its_item(damage: Any) -> None:
    engine = FakeEngine(damage=damage, faults=2)
    (result,) = backend_of(engine).score([work_of("at_ids")])
    assert isinstance(result, ItemError)
    assert result.code == "internal"
    assert len(engine.calls) == 2


def other_tokens(output: Any) -> None:
    flat_ = output.prompt_logprobs
    flat_.token_ids[flat_.start_indices[-2]] += 1


def unwritten_row(output: Any) -> None:
    flat_ = output.prompt_logprobs
    for place in range(flat_.start_indices[-3], flat_.end_indices[-3]):
        flat_.logprobs[place] = float("nan")


def rows_missing(output: Any) -> None:
    flat_ = output.prompt_logprobs
    del flat_.start_indices[4:], flat_.end_indices[4:]


def ids_of_nothing(output: Any) -> None:
    flat_ = output.prompt_logprobs
    flat_.token_ids[flat_.start_indices[-1] + 1] = -1


@pytest.mark.parametrize("damage", [drop, cached_too_far, other_tokens, unwritten_row, rows_missing, ids_of_nothing])
def test_invalid_top_k_rows_are_never_returned(damage: Any) -> None:
    for faults, kind in ((1, ItemScore), (2, ItemError)):
        engine = FakeEngine(fixed_ids=False, damage=damage, faults=faults)
        (result,) = backend_of(engine).score([work_of("teacher_topk")])
        assert isinstance(result, kind)


def test_unwritten_rows_are_nan() -> None:
    """The V1 runner does not write rows of cached positions; the extension makes them NaN."""
    from vllm.v1.outputs import LogprobsTensors

    from teacher_server.backends.vllm.worker import nan_until_written

    assert torch.isnan(nan_until_written(LogprobsTensors.empty_cpu)(3, 4).logprobs).all()


# --- contexts -------------------------------------------------------------------------------------------------------


def test_only_chains_of_contexts_share_a_salt() -> None:
    engine = FakeEngine()
    backend = backend_of(engine)
    (root,) = backend.prefill([as_ids(range(10))], None)
    (leaf,) = backend.prefill([as_ids(range(10, 14))], root)
    (twin,) = backend.prefill([as_ids(range(10))], None)
    assert leaf.salt == root.salt != twin.salt
    assert leaf.ids.tolist() == list(range(14))
    assert (leaf.total_tokens, leaf.nbytes) == (14, 8)
    backend.score([work_of("sampled", prefix=leaf), work_of("sampled")])
    assert [ask.salt for ask in engine.calls[-1]] == [leaf.salt, None]


def test_a_prompt_without_a_context_that_several_responses_share_has_a_salt() -> None:
    engine = FakeEngine()
    lone, *same = [work_of("sampled", seed=seed) for seed in range(3)]
    same = [replace(work, item=replace(work.item, prompt_ids=as_ids([1, 2, 3]))) for work in same]
    backend = backend_of(engine)
    for _ in range(2):
        backend.score([same[0], lone, same[1]])
    (first, none, second), (later, *_) = ([ask.salt for ask in requests] for requests in engine.calls)
    assert none is None
    assert first == second
    assert len({first, later, None}) == 3


def test_a_batch_never_needs_more_cache_than_there_is() -> None:
    """Each item: 3 + 7 own tokens and two blocks, the context of 10 once a call."""
    engine = FakeEngine(cache_tokens=50)
    backend = backend_of(engine)
    (prefix,) = backend.prefill([as_ids(range(10))], None)
    results = backend.score([work_of("sampled", seed=seed, prefix=prefix) for seed in range(5)])
    assert [len(requests) for requests in engine.calls] == [1, 2, 2, 1]
    assert all(isinstance(result, ItemScore) for result in results)


# --- the installed vLLM ---------------------------------------------------------------------------------------------


def test_the_calls_that_only_a_gpu_runs_exist_in_this_vllm() -> None:
    from vllm.outputs import RequestOutput
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.outputs import LogprobsTensors, ModelRunnerOutput

    assert "prompt_token_id_logprobs" in inspect.signature(RequestOutput.__init__).parameters
    assert "num_cached_tokens" in inspect.signature(RequestOutput.__init__).parameters
    assert "prompt_token_id_logprobs_dict" in {one.name for one in fields(ModelRunnerOutput)}
    assert list(inspect.signature(LogprobsTensors.empty_cpu).parameters) == [
        "num_positions",
        "num_tokens_per_position",
    ]
    assert "skip_reading_prefix_cache" in inspect.getsource(KVCacheManager)


def test_replaced_functions_have_the_signatures_of_ours() -> None:
    """Read from the source: the V2 runner's module cannot be imported without Triton."""
    import vllm
    from vllm.v1.sample.sampler import Sampler

    root = Path(vllm.__file__).parent / "v1"
    used = (root / "worker/gpu/sample/prompt_logprob.py").read_text()
    assert "    compute_token_logprobs,\n" in used
    assert "else compute_token_logprobs(logits, ids)" in used
    assert "torch.empty_like(req.token_ids, dtype=torch.float32)" in used
    definition = (root / "worker/gpu/sample/logprob.py").read_text()
    assert "def compute_token_logprobs(\n    logits: torch.Tensor, token_ids: torch.Tensor\n)" in definition
    assert list(inspect.signature(fixed_id_rows).parameters) == ["logits", "token_ids", "temperature"]
    ours, theirs = inspect.signature(top_k_rows), inspect.signature(Sampler.gather_logprobs)
    assert list(ours.parameters) == [*theirs.parameters, "temperature"]
    assert "self.sampler.gather_logprobs(" in (root / "worker/gpu_model_runner.py").read_text()


def test_settings_and_sampling_are_arguments_that_this_vllm_takes() -> None:
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs

    from teacher_server.backends.vllm.engine import sampling

    known = {one.name for one in fields(EngineArgs)}
    for gpu in (True, False):
        assert set(engine_settings(TeacherConfig(), gpu=gpu)) <= known
    gpu_settings = engine_settings(TeacherConfig(tensor_parallel_size=4, gpu_memory_utilization=0.5), gpu=True)
    assert (gpu_settings["tensor_parallel_size"], gpu_settings["gpu_memory_utilization"]) == (4, 0.5)
    ids = np.ones((3, 4), dtype=np.int32)
    params = sampling(EngineRequest([1, 2, 3, 4, 5], "salt", start=1, fixed_ids=ids))
    assert isinstance(params, SamplingParams)
    assert params.prompt_logprob_token_ids is not None
    assert params.prompt_logprob_start == 1
    assert params.skip_reading_prefix_cache is False
    assert sampling(EngineRequest([1, 2], None, top_k_columns=3)).skip_reading_prefix_cache is True


# --- the fingerprint ------------------------------------------------------------------------------------------------


def test_the_fingerprint_follows_the_weights(tiny_model: Path, tiny_untied_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    before = weights_fingerprint(tiny_model)
    assert before == weights_fingerprint(tiny_model) != weights_fingerprint(tiny_untied_model)
    tensors = load_file(tiny_model / "model.safetensors")
    (tmp_path / "config.json").write_text((tiny_model / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert weights_fingerprint(tmp_path) == before
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] + 1e-3}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert weights_fingerprint(tmp_path) != before
