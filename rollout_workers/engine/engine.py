"""The student as a vLLM engine: token ids in, token ids and log-probs out. No Ray, no HTTP."""

from __future__ import annotations

import os
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.config.gpus import enforce_eager, memory_utilization
from common.config.model import Config, RolloutConfig, StudentConfig, SyncConfig
from common.data.model_lookup import load_tokenizer
from common.data.special_tokens import answer_text, end_ids, special_tokens
from common.data.token_text import decode_ids
from common.float32_head import ENGINE_OVERRIDES
from common.openmp import share_cores
from common.protocol.schema import F32, FinishReason, Ids, Sampling, TokenSequence, as_ids
from common.weight_sync.manifest import SyncManifest
from rollout_workers.engine.stop_strings import StopTokens, first_stop, resolve_stop_strings
from rollout_workers.pool.failures import EngineLost
from rollout_workers.vllm_plugin.sync_info import WEIGHT_TRANSFER, init_info, update_info

LIVENESS_POLL_S = 0.5
"""Interval of liveness checks during a control call."""


MESSAGE_ARRAY_BYTES = 64 * 1024
"""Arrays up to this size are copied into vLLM's messages from engine to front end; vLLM's default is 256."""


ONE_PASS: dict[str, Any] = {
    "max_tokens": 1,  # vLLM must generate at least one token; it is ignored
    "temperature": 0.0,
    "detokenize": False,
    "ignore_eos": True,
    "skip_reading_prefix_cache": True,
}
"""Sampling parameters of a request whose prompt is scored."""


class RolloutError(RuntimeError):
    """A request that this engine cannot answer; the message names the request and the numbers."""


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer; fields as in `common.protocol.schema.Trajectory`."""

    response_ids: Ids
    sampled_logprobs: F32
    topk_ids: Ids
    finish_reason: FinishReason
    versions: tuple[tuple[int, int], ...]


class RolloutEngine:
    """A running vLLM engine with one model: create it with `start`, always `close` it."""

    def __init__(self, engine: Any, tokenizer: Any, max_sequence_tokens: int, sync: SyncConfig) -> None:
        self._engine = engine
        self._sync = sync
        self._tokenizer = tokenizer
        self._stop_tokens: dict[tuple[str, ...], StopTokens] = {}
        self.max_sequence_tokens = max_sequence_tokens
        self.weight_version = 0

    @classmethod
    async def start(cls, model: str, config: Config, *, max_logprobs: int) -> RolloutEngine:
        """Load `model` and start the engine (tens of seconds).

        Raises ValueError if `max_logprobs` is too large, or if vLLM needs a GPU and the process sees none.
        """
        _set_environment(config.rollout)
        from vllm.platforms import current_platform

        if current_platform.is_cuda_alike() and not _on_gpu():
            raise ValueError(
                "the installed vLLM computes on GPUs, and this worker has none: set rollout.gpus_per_worker, or "
                "install vLLM's CPU build"
            )
        from vllm.v1.engine.async_llm import AsyncLLM

        from rollout_workers.engine import topk_rows

        topk_rows.install()
        tokenizer = load_tokenizer(model)
        engine = AsyncLLM.from_engine_args(engine_args(model, config, max_logprobs=max_logprobs))
        running = cls(engine, tokenizer, int(engine.model_config.max_model_len), config.sync_in_run)
        try:
            vocab_size = int(engine.model_config.get_vocab_size())
            if max_logprobs > vocab_size:
                raise ValueError(f"loss.top_k is {max_logprobs}, the vocabulary has {vocab_size} ids")
            await engine.update_weight_version("0")
        except BaseException:
            running.close()
            raise
        return running

    async def generate(self, prompt_ids: Sequence[int] | Ids, sampling: Sampling, request_id: str) -> Generation:
        """Answer a token prompt; the answer includes its stop token.

        Raises RolloutError if the prompt plus ``max_tokens`` exceeds the engine's context: nothing is truncated.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        prompt = [int(i) for i in prompt_ids]
        longest = len(prompt) + sampling.max_tokens
        if longest > self.max_sequence_tokens:
            raise RolloutError(
                f"{request_id}: {len(prompt)} prompt tokens + {sampling.max_tokens} of answer are {longest}, the "
                f"engine takes {self.max_sequence_tokens}: raise student.max_sequence_tokens or lower "
                "rollout.max_tokens"
            )
        stops = self._resolve_stops(sampling.stop)
        params = SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=sampling.seed,
            logprobs=sampling.top_logprobs,
            output_kind=RequestOutputKind.FINAL_ONLY,  # else this coroutine would wake for every token
            detokenize=False,
            stop_token_ids=sorted({*stops.token_ids, *self._end_ids()}),
            routed_experts_prompt_start=len(prompt),  # with `sync.expert_mismatch`: none of the prompt travel
        )
        completion = await self._run(prompt, params, request_id, lambda output: output.outputs[0])
        ids = as_ids(completion.token_ids)
        sampled, topk = _columns(completion, sampling.top_logprobs, request_id)
        finish = _finish(completion.finish_reason, request_id)
        decode = partial(decode_ids, self._tokenizer)
        kept = first_stop(ids.tolist(), stops.spanning, decode) if stops.spanning else None
        if kept is not None:
            ids, sampled, topk, finish = ids[:kept], sampled[:kept], topk[:kept], "stop"
        spans = tuple((span.start, int(span.version)) for span in completion.weight_versions or ())
        return Generation(ids, sampled, topk, finish, tuple(s for s in spans if s[0] < len(ids)))

    async def logprobs(self, sequences: Sequence[TokenSequence]) -> list[F32]:
        """Log-probs of each sequence's response tokens ``[T]`` at temperature 1, computed without the prefix cache."""
        import asyncio

        from vllm import SamplingParams

        params = SamplingParams(prompt_logprobs=0, flat_logprobs=True, **ONE_PASS)

        async def score(index: int, sequence: TokenSequence) -> F32:
            name = f"probe-{self.weight_version}-{index}"
            flat = await self._run(_ids(sequence), params, name, lambda output: output.prompt_logprobs)
            starts = flat.start_indices[len(sequence.prompt_ids) :]
            if [flat.token_ids[start] for start in starts] != sequence.response_ids.tolist():
                raise RolloutError(f"{name}: the engine scored other tokens than it was given")
            return np.asarray([flat.logprobs[start] for start in starts], dtype=np.float32)

        return list(await asyncio.gather(*(score(i, sequence) for i, sequence in enumerate(sequences))))

    async def experts(self, sequences: Sequence[TokenSequence]) -> list[NDArray[Any]]:
        """Experts that predict each sequence's response tokens, ``[T, layers, k]``; zeros in layers without experts.

        Needs ``sync.expert_mismatch``.
        """
        import asyncio

        from vllm import SamplingParams

        async def choose(index: int, sequence: TokenSequence) -> NDArray[Any]:
            ids, name = _ids(sequence), f"experts-{self.weight_version}-{index}"
            rows = await self._run(
                ids, SamplingParams(**ONE_PASS), name, lambda output: output.outputs[0].routed_experts
            )
            if len(rows) != len(ids):
                raise RolloutError(f"{name}: vLLM recorded the experts of {len(rows)} tokens, not of {len(ids)}")
            return np.asarray(rows[len(sequence.prompt_ids) - 1 : -1])

        return list(await asyncio.gather(*(choose(i, sequence) for i, sequence in enumerate(sequences))))

    async def join_sync(self, host: str, port: int, rank: int, world_size: int) -> None:
        """Join a weight group, leaving the previous one; this engine's workers take the ranks from `rank` on.

        Blocks until all members have joined. Called again, with another address, whenever the members change.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        info = init_info(self._sync, host, port, rank, world_size)
        request = WeightTransferInitRequest(init_info=info)
        await self._control_call(self._engine.init_weight_transfer_engine(request))

    async def receive(self, manifest: SyncManifest, version: int) -> None:
        """Receive the weights published as `version`; answers in flight pause and continue with them."""
        await self._control_call(self._receive(manifest, version))

    async def _receive(self, manifest: SyncManifest, version: int) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        # No resume after a failure: the engine may hold half of the weights. Answers in flight wait for the next sync.
        await self._engine.pause_generation(mode="keep", clear_cache=True)
        await self._engine.start_weight_update()
        await self._engine.update_weights(WeightTransferUpdateRequest(update_info=update_info(manifest.at(version))))
        await self._engine.finish_weight_update(weight_version=str(version))
        self.weight_version = version
        await self._engine.resume_generation()

    async def check_health(self) -> None:
        """Return once the engine process answers, between two forward passes; raises EngineLost if it died.

        A hung engine never answers: the caller sets the timeout.
        """
        await self._control_call(self._round_trip())

    async def _round_trip(self) -> None:
        await self._engine.check_health()  # reads this process's state only
        await self._engine.is_sleeping()  # a round trip to the engine process

    def answer_text(self, ids: Sequence[int], stop_strings: Sequence[str]) -> str:
        """Text of an answer, up to its first stop string and without the token that ends it."""
        return answer_text(self._tokenizer, ids, self._end_ids(), stop_strings)

    def close(self) -> None:
        """Stop the engine's processes."""
        self._engine.shutdown()

    async def _control_call(self, call: Coroutine[Any, Any, None]) -> None:
        """Wait for a control call; raises EngineLost if the engine dies meanwhile, which vLLM leaves unanswered."""
        import asyncio

        task = asyncio.ensure_future(call)
        try:
            with _engine_alive():
                while not (await asyncio.wait({task}, timeout=LIVENESS_POLL_S))[0]:
                    if self._engine.errored:
                        raise self._engine.dead_error
                await task
        finally:
            task.cancel()

    async def _run(self, prompt: list[int], params: Any, request_id: str, pick: Any) -> Any:
        result: Any = None
        with _engine_alive():
            async for output in self._engine.generate({"prompt_token_ids": prompt}, params, request_id):
                result = output
        return pick(result)

    def _resolve_stops(self, stop_strings: tuple[str, ...]) -> StopTokens:
        if stop_strings not in self._stop_tokens:
            tokenizer = self._tokenizer
            texts = [decode_ids(tokenizer, [index]) for index in range(len(tokenizer))]
            self._stop_tokens[stop_strings] = resolve_stop_strings(stop_strings, texts, special_tokens(tokenizer))
        return self._stop_tokens[stop_strings]

    def _end_ids(self) -> frozenset[int]:
        config = self._engine.model_config.try_get_generation_config()
        return end_ids(self._tokenizer, config.get("eos_token_id"))


def _ids(sequence: TokenSequence) -> list[int]:
    return [*sequence.prompt_ids.tolist(), *sequence.response_ids.tolist()]


@contextmanager
def _engine_alive() -> Iterator[None]:
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError as error:
        raise EngineLost("the vLLM engine died (its own log says why)") from error


def _finish(reason: str | None, request_id: str) -> FinishReason:
    """Reject an aborted answer: training must not treat it as one that the student ended."""
    if reason == "stop":
        return "stop"
    if reason == "length":
        return "length"
    raise RolloutError(f"{request_id}: the engine ended the answer with {reason!r}")


def _columns(completion: Any, k: int, request_id: str) -> tuple[F32, Ids]:
    """Return (log-prob of the sampled token ``[T]``, top-k ids ``[T, k]``); raises RolloutError if they do not fit."""
    from rollout_workers.engine.topk_rows import TopKRows

    rows = completion.logprobs
    try:
        if not isinstance(rows, TopKRows):
            raise ValueError(f"{type(rows).__name__} in place of TopKRows")
        return rows.columns(completion.token_ids, k)
    except ValueError as error:
        raise RolloutError(
            f"{request_id}: vLLM's log-probs do not fit its answer ({error}): use vLLM 0.32.0"
        ) from error


def engine_args(model: str, config: Config, *, max_logprobs: int) -> Any:
    """vLLM's ``AsyncEngineArgs`` for a rollout engine of the run."""
    from vllm import AsyncEngineArgs
    from vllm.config import WeightTransferConfig

    rollout = config.rollout
    args = AsyncEngineArgs(
        model=model,
        dtype=_dtype(config.student),
        hf_overrides=ENGINE_OVERRIDES,
        seed=config.run.seed,
        max_model_len=config.student.max_sequence_tokens,
        # Other sequences in the batch, or cached blocks, change the last bit of a log-prob.
        max_num_seqs=1 if config.learner.deterministic else rollout.max_num_seqs,
        enable_prefix_caching=False if config.learner.deterministic else None,
        tensor_parallel_size=rollout.tensor_parallel_size,
        gpu_memory_utilization=memory_utilization(rollout.gpu_memory_utilization, rollout.gpus_per_worker),
        enforce_eager=enforce_eager(rollout, deterministic=config.learner.deterministic),
        # A chunked prompt makes vLLM rewind the request's random generator, which crashes the engine on CPU.
        enable_chunked_prefill=None if _on_gpu() else False,
        distributed_executor_backend=_executor(rollout.tensor_parallel_size),
        max_logprobs=max_logprobs,
        # Outside the nucleus every processed log-prob is -inf, so the ids of the top k there would be arbitrary.
        logprobs_mode="processed_logprobs" if rollout.top_p == 1 else "raw_logprobs",
        # The model's own generation_config would silently change temperature, top-k or penalties.
        generation_config="vllm",
        language_model_only=True,  # a vision tower is neither used nor reloaded
        weight_transfer_config=WeightTransferConfig(backend=WEIGHT_TRANSFER),
        enable_return_routed_experts=config.sync.expert_mismatch,
        disable_log_stats=True,
    )
    if args.enable_chunked_prefill is False and args.create_model_config().has_inner_state:
        args.enable_prefix_caching = False  # vLLM caches the states of such layers (Mamba) with chunked prompts only
    return args


def _dtype(student: StudentConfig) -> str:
    return student.dtype if student.dtype != "auto" else ("bfloat16" if _on_gpu() else "float32")


def _executor(tensor_parallel_size: int) -> Any:
    """Executor class or name; None lets vLLM choose.

    Several GPUs of one actor need `mp`: inside a placement group vLLM would choose `ray`, which wants a bundle for each
    GPU. For a single CPU worker vLLM would start another process, to set its OpenMP environment, and busy-wait for it
    on a core; here the engine process has that environment already (`_set_environment`).
    """
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    if tensor_parallel_size > 1:
        return "mp"
    return None if _on_gpu() else UniProcExecutor


def _on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _set_environment(rollout: RolloutConfig) -> None:
    """Set the variables that vLLM and its processes read; all but the first matter on CPU only."""
    # A token's rows of log-probs travel inside a step's message, not as two more frames.
    os.environ["VLLM_MSGPACK_ZERO_COPY_THRESHOLD"] = str(MESSAGE_ARRAY_BYTES)
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(rollout.kv_cache_gib)
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    share_cores(os.environ)
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    if rollout.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(rollout.threads)
