"""The student as a vLLM engine: token ids in, token ids and log-probs out. No Ray, no HTTP."""

from __future__ import annotations

import os
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.config.model import Config, SyncConfig
from common.data.rendering import load_tokenizer
from common.openmp import share_cores
from common.protocol.schema import F32, FinishReason, Ids, Sampling, TokenSequence, as_ids
from common.weight_sync.manifest import SyncManifest
from rollout_workers.engine.stops import Stops, first_stop, resolve_stops
from rollout_workers.pool.failures import EngineLost
from rollout_workers.vllm_plugin.sync_info import WEIGHT_TRANSFER, init_info, update_info

LIFE_EVERY_S = 0.5
"""How often an engine that owes an answer is looked at."""


class RolloutError(RuntimeError):
    """A request that this engine cannot answer; names the sample and the numbers."""


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer; the fields are those of `common.protocol.schema.Trajectory`."""

    response_ids: Ids
    sampled_logprobs: F32
    topk_ids: Ids
    finish_reason: FinishReason
    versions: tuple[tuple[int, int], ...]


class RolloutEngine:
    """A running vLLM engine under one model; start it with `start`, always `close` it."""

    def __init__(self, engine: Any, tokenizer: Any, limit_tokens: int, sync: SyncConfig) -> None:
        self._engine = engine
        self._sync = sync
        self._tokenizer = tokenizer
        self._stops: dict[tuple[str, ...], Stops] = {}
        self.limit_tokens = limit_tokens
        self.weight_version = 0

    @classmethod
    async def start(cls, model: str, config: Config, *, max_logprobs: int) -> RolloutEngine:
        """Load `model`, start the engine: tens of seconds. Raises ValueError for a top-k over the vocabulary."""
        _set_environment(config)
        from vllm import AsyncEngineArgs
        from vllm.config import WeightTransferConfig
        from vllm.v1.engine.async_llm import AsyncLLM

        rollout = config.rollout
        args = AsyncEngineArgs(
            model=model,
            dtype=_dtype(config),
            seed=config.run.seed,
            max_model_len=config.student.max_sequence_tokens,
            # What else is in a batch, or was cached before, shows in the last bit of a log-prob.
            max_num_seqs=1 if config.learner.deterministic else rollout.max_num_seqs,
            enable_prefix_caching=not config.learner.deterministic,
            enable_sleep_mode=rollout.colocated,
            tensor_parallel_size=rollout.tensor_parallel_size,
            gpu_memory_utilization=rollout.gpu_memory_utilization,
            enforce_eager=rollout.enforce_eager,
            # A prompt that is cut costs its answer's generator a draw, which vLLM takes back: on CPU it dies in trying.
            enable_chunked_prefill=None if _on_gpu() else False,
            distributed_executor_backend=_executor(config),
            max_logprobs=max_logprobs,
            logprobs_mode="processed_logprobs",
            # The model's own generation_config would change temperature, top-k or penalties without a word.
            generation_config="vllm",
            weight_transfer_config=WeightTransferConfig(backend=WEIGHT_TRANSFER),
            disable_log_stats=True,
        )
        tokenizer = load_tokenizer(model)
        engine = AsyncLLM.from_engine_args(args)
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
        """One answer to a token prompt, its last token the stop where there was one.

        Raises RolloutError where the prompt and the longest answer exceed what the engine can hold: nothing is cut.
        """
        from vllm import SamplingParams

        prompt = [int(i) for i in prompt_ids]
        longest = len(prompt) + sampling.max_tokens
        if longest > self.limit_tokens:
            raise RolloutError(
                f"{request_id}: {len(prompt)} prompt tokens + {sampling.max_tokens} of answer are {longest}, the "
                f"engine takes {self.limit_tokens}: raise student.max_sequence_tokens or lower rollout.max_tokens"
            )
        stops = self._resolve(sampling.stop)
        params = SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.draw_from,
            seed=sampling.seed,
            logprobs=sampling.top_k,
            flat_logprobs=True,
            detokenize=False,
            stop_token_ids=[*stops.token_ids, *self._ends()],
        )
        completion = await self._run(prompt, params, request_id, lambda output: output.outputs[0])
        ids = as_ids(completion.token_ids)
        sampled, topk = _columns(completion.logprobs, len(ids), sampling.top_k)
        finish = _finish(completion.finish_reason, request_id)
        kept = first_stop(ids.tolist(), stops.spanning, self.decode) if stops.spanning else None
        if kept is not None:
            ids, sampled, topk, finish = ids[:kept], sampled[:kept], topk[:kept], "stop"
        spans = tuple((span.start, int(span.version)) for span in completion.weight_versions or ())
        return Generation(ids, sampled, topk, finish, tuple(s for s in spans if s[0] < len(ids)))

    async def logprobs(self, sequences: Sequence[TokenSequence]) -> list[F32]:
        """log-probs of each sequence's response tokens at temperature 1, ``[T]`` each, none read from a cache."""
        import asyncio

        from vllm import SamplingParams

        # One token must be generated; it is not looked at.
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            ignore_eos=True,
            skip_reading_prefix_cache=True,
        )

        async def one(index: int, sequence: TokenSequence) -> F32:
            ids = [*sequence.prompt_ids.tolist(), *sequence.response_ids.tolist()]
            name = f"probe-{self.weight_version}-{index}"
            flat = await self._run(ids, params, name, lambda output: output.prompt_logprobs)
            starts = flat.start_indices[len(sequence.prompt_ids) :]
            if [flat.token_ids[start] for start in starts] != sequence.response_ids.tolist():
                raise RolloutError(f"{name}: the engine scored other tokens than it was given")
            return np.asarray([flat.logprobs[start] for start in starts], dtype=np.float32)

        return list(await asyncio.gather(*(one(i, sequence) for i, sequence in enumerate(sequences))))

    async def join_sync(self, host: str, port: int, rank: int, world_size: int) -> None:
        """Join the weight group, leaving the one before; this engine's workers take the ranks from `rank` on.

        Blocks until all are there. Called again, with another address, whenever the members change.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        info = init_info(self._sync, host, port, rank, world_size)
        request = WeightTransferInitRequest(init_info=info)
        await self._answered(self._engine.init_weight_transfer_engine(request))

    async def receive(self, manifest: SyncManifest, version: int) -> None:
        """Take the weights that the sender publishes as `version`; answers in flight wait and go on under them."""
        await self._answered(self._receive(manifest, version))

    async def _receive(self, manifest: SyncManifest, version: int) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        # No resume after a failure: the engine may hold half of the weights. Answers in flight wait for the next try.
        await self._engine.pause_generation(mode="keep", clear_cache=True)
        await self._engine.start_weight_update()
        await self._engine.update_weights(WeightTransferUpdateRequest(update_info=update_info(manifest.at(version))))
        await self._engine.finish_weight_update(weight_version=str(version))
        self.weight_version = version
        await self._engine.resume_generation()

    async def sleep(self) -> None:
        """Give the GPU's memory back: weights move to host memory, the key-value cache is dropped."""
        await self._answered(self._engine.sleep(level=1))

    async def wake(self) -> None:
        """Take it again; the weights are what they were."""
        await self._answered(self._engine.wake_up())

    async def check_health(self) -> None:
        """Returns once the engine has answered, between two forward passes: never where it hangs, so the caller sets
        the limit. Raises EngineLost where the engine's processes are gone.
        """
        await self._answered(self._answers())

    async def _answers(self) -> None:
        await self._engine.check_health()  # looks at what this process knows, and asks nobody
        await self._engine.is_sleeping()  # goes to the engine's own process and back

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def close(self) -> None:
        """End the engine's processes."""
        self._engine.shutdown()

    async def _answered(self, call: Coroutine[Any, Any, None]) -> None:
        """Wait for a control call. vLLM leaves those of an engine that has died without an answer, so its life is
        looked at meanwhile; raises EngineLost.
        """
        import asyncio

        task = asyncio.ensure_future(call)
        try:
            with _engine_alive():
                while not (await asyncio.wait({task}, timeout=LIFE_EVERY_S))[0]:
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

    def _resolve(self, stops: tuple[str, ...]) -> Stops:
        if stops not in self._stops:
            tokenizer = self._tokenizer
            special = {text: tokenizer.convert_tokens_to_ids(text) for text in tokenizer.all_special_tokens}
            texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))], skip_special_tokens=True)
            self._stops[stops] = resolve_stops(stops, texts, special)
        return self._stops[stops]

    def _ends(self) -> list[int]:
        """End-of-sequence ids: the tokenizer's and those of the model's generation config."""
        config = self._engine.model_config.try_get_generation_config()
        ends = config.get("eos_token_id", [])
        listed = ends if isinstance(ends, list) else [ends]
        own = self._tokenizer.eos_token_id
        return sorted({i for i in (*listed, own) if i is not None})


@contextmanager
def _engine_alive() -> Iterator[None]:
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError as error:
        raise EngineLost("the vLLM engine died (its own log says why)") from error


def _finish(reason: str | None, request_id: str) -> FinishReason:
    """An aborted answer is a part of one: it must not be trained on as if the student had ended there."""
    if reason == "stop":
        return "stop"
    if reason == "length":
        return "length"
    raise RolloutError(f"{request_id}: the engine ended the answer with {reason!r}")


def _columns(flat: Any, tokens: int, k: int) -> tuple[F32, Ids]:
    """(log-prob of the sampled token ``[T]``, ids of the top k ``[T, k]``): vLLM puts the sampled token first."""
    width = k + 1
    starts: NDArray[np.int64] = np.asarray(flat.start_indices, dtype=np.int64)
    if len(starts) != tokens or len(flat.token_ids) != tokens * width:
        raise RolloutError(
            f"the engine returned {len(flat.token_ids)} log-probs for {tokens} tokens, expected {tokens * width}"
        )
    values = np.asarray(flat.logprobs, dtype=np.float32).reshape(tokens, width)
    return values[:, 0].copy(), as_ids(np.asarray(flat.token_ids).reshape(tokens, width)[:, 1:])


def _dtype(config: Config) -> str:

    wanted = config.student.dtype
    return wanted if wanted != "auto" else ("bfloat16" if _on_gpu() else "float32")


def _executor(config: Config) -> Any:
    """On CPU vLLM would put one worker, too, into a process of its own, to give it an OpenMP environment, and wait for
    it on a core of its own. Here the engine's process has that environment already (`_set_environment`).
    """
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    return UniProcExecutor if not _on_gpu() and config.rollout.tensor_parallel_size == 1 else None


def _on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _set_environment(config: Config) -> None:
    """vLLM reads these before anything else; they only matter on CPU."""
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(config.rollout.kv_cache_gib)
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    share_cores(os.environ)
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    # Loading weights takes new memory for every layer: small pages would cost more than the copies.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    if config.rollout.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(config.rollout.threads)
