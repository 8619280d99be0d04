"""A vLLM engine that only scores token ids, for one caller. Hides vLLM's classes from the backend."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any

import torch
from numpy.typing import NDArray

from common.config.gpus import memory_utilization
from common.config.model import TeacherConfig
from common.float32_head import ENGINE_OVERRIDES
from teacher_server.backends.base import BackendError, BackendLost
from teacher_server.backends.vllm.worker import EXTENSION, FIXED_COLUMNS

CPU_CHUNK_TOKENS = 2048
"""Tokens of an engine step on CPU, which holds the logits of all its prompt tokens at once."""


@dataclass(frozen=True, slots=True, eq=False)
class EngineRequest:
    """A request for log-probs of the tokens of ``ids`` after the first `start` + 1: at `fixed_ids`, or at the engine's
    best `top_k_columns` - 1 ids with the tail. With neither it is a prefill.

    `salt` names the part of the prefix cache that the request reads and writes; None reads nothing.
    """

    ids: list[int]
    salt: str | None = None
    start: int = 0
    fixed_ids: NDArray[Any] | None = None
    top_k_columns: int | None = None


class ScoringEngine:
    """A running engine. `close`, or any end of this process, ends the engine's processes."""

    def __init__(self, model: str, config: TeacherConfig) -> None:
        """Load the model, which takes tens of seconds. Raises BackendError."""
        self._model, self._config = model, config
        self._load()

    def restart(self) -> None:
        """Start again after BackendLost. Raises BackendError."""
        self.close()
        self._load()

    def _load(self) -> None:
        gpu = torch.cuda.is_available()
        dtype = self._config.dtype if self._config.dtype != "auto" else ("bfloat16" if gpu else "float32")
        self._llm = self._start(dtype, gpu)
        resolved = self._llm.llm_engine.vllm_config
        model_config = resolved.model_config
        self.fixed_ids = bool(resolved.use_v2_model_runner)
        self.dtype = str(model_config.dtype).removeprefix("torch.")
        self.vocab_size = int(model_config.get_vocab_size())
        # vLLM generates one token for each request, which is discarded.
        self.max_sequence_tokens = int(model_config.max_model_len) - 1
        self.block_tokens = int(resolved.cache_config.block_size)
        self.cache_tokens = int(resolved.cache_config.num_gpu_blocks) * self.block_tokens
        self.token_bytes = _key_value_bytes(model_config, resolved.parallel_config)
        self._llm.collective_rpc("opcd_install_scoring", args=(self.fixed_ids,))
        self._temperature = 1.0
        _report_death(self._llm.llm_engine.engine_core)

    def _start(self, dtype: str, gpu: bool) -> Any:
        # vLLM reads these at import. The second only matters on CPU.
        os.environ["VLLM_NO_USAGE_STATS"] = "1"
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        # A fork would inherit locks of the threads of torch and the server.
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
        config = self._config
        if config.threads is not None:
            os.environ["OMP_NUM_THREADS"] = str(config.threads)
        try:
            from vllm import LLM
            from vllm.platforms import current_platform
            from vllm.v1.executor.uniproc_executor import UniProcExecutor
        except ImportError as error:
            raise BackendError(f"teacher.backend `vllm` needs vLLM, which cannot be imported here: {error}") from error
        if current_platform.is_cuda_alike() and not gpu:
            raise BackendError(
                "the installed vLLM computes on GPUs, and this teacher has none: set teacher.gpus, or install vLLM's "
                "CPU build"
            )
        # On CPU vLLM starts even a single worker in another process, to set OpenMP up, and busy-waits for it.
        # Here the variables above set OpenMP up, so the worker runs in the engine's process.
        single = not gpu and config.tensor_parallel_size == 1
        executor = {"distributed_executor_backend": UniProcExecutor} if single else {}
        try:
            return LLM(model=self._model, dtype=dtype, **engine_settings(config, gpu=gpu), **executor)
        except (RuntimeError, ValueError) as error:
            raise BackendError(f"vLLM cannot start: {error}") from error

    def run(self, requests: Sequence[EngineRequest], temperature: float = 1.0) -> list[Any]:
        """vLLM's ``RequestOutput`` of every request, in order; scores are at `temperature`.

        Raises BackendLost if the engine's processes died.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        prompts = [
            {"prompt_token_ids": request.ids} | ({} if request.salt is None else {"cache_salt": request.salt})
            for request in requests
        ]
        try:
            if temperature != self._temperature:
                self._llm.collective_rpc("opcd_set_temperature", args=(self.fixed_ids, temperature))
                self._temperature = temperature
            return list(self._llm.generate(prompts, [sampling(request) for request in requests], use_tqdm=False))
        except EngineDeadError as error:
            raise BackendLost("the vLLM engine died (its own log says why)") from error

    def close(self) -> None:
        """End the engine's processes."""
        self._llm.llm_engine.engine_core.shutdown()


def _report_death(core: Any) -> None:
    """Have a request that waits for vLLM's client `core` raise EngineDeadError when the engine's process ends.

    The client itself raises it for an exception of the engine only: after a kill a waiting request hangs.
    """
    from vllm.v1.engine.exceptions import EngineDeadError

    def watch() -> None:
        connection.wait(core.resources.engine_manager.sentinels())
        core.outputs_queue.put(EngineDeadError())

    threading.Thread(target=watch, daemon=True, name="engine-death").start()


def engine_settings(config: TeacherConfig, *, gpu: bool) -> dict[str, Any]:
    """Arguments of ``vllm.LLM``, model and dtype excluded."""
    max_tokens = config.max_sequence_tokens
    return {
        "hf_overrides": ENGINE_OVERRIDES,
        # Requests and results are token ids.
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "tensor_parallel_size": config.tensor_parallel_size,
        # Inside a placement group vLLM would choose `ray`, which wants a bundle for each GPU of the actor.
        **({"distributed_executor_backend": "mp"} if config.tensor_parallel_size > 1 else {}),
        "max_model_len": None if max_tokens is None else max_tokens + 1,
        "max_num_batched_tokens": max(config.batch_tokens, 256) if gpu else CPU_CHUNK_TOKENS,
        "max_num_seqs": 1 if config.batch_items == 1 else 128,
        "max_logprobs": FIXED_COLUMNS + 3 * config.max_k,
        "logprobs_mode": "raw_logprobs",
        # Batch size 1 is for bit-exact scores, and cached prefixes change the last bit of a log-prob.
        "enable_prefix_caching": config.batch_items != 1,
        # CUDA graphs only speed up decoding, which scoring does not need.
        "enforce_eager": True,
        "worker_extension_cls": EXTENSION,
        **(
            {"gpu_memory_utilization": memory_utilization(config.gpu_memory_utilization, config.gpus)}
            if gpu
            else {"kv_cache_memory_bytes": config.context_cache_bytes}
        ),
    }


def sampling(request: EngineRequest) -> Any:
    """vLLM's ``SamplingParams`` for a request."""
    from vllm import SamplingParams

    scored = request.fixed_ids is not None
    return SamplingParams(
        max_tokens=1,
        temperature=0.0,
        ignore_eos=True,
        detokenize=False,
        flat_logprobs=True,
        prompt_logprobs=request.top_k_columns,
        prompt_logprob_token_ids=request.fixed_ids,
        prompt_logprob_start=request.start if scored else None,
        skip_reading_prefix_cache=request.salt is None,
    )


def _key_value_bytes(model_config: Any, parallel_config: Any) -> int:
    """Bytes of one token's keys and values in all layers, on all GPUs together."""
    heads = model_config.get_num_kv_heads(parallel_config) * parallel_config.tensor_parallel_size
    layers = model_config.get_num_layers(parallel_config)
    return int(2 * layers * heads * model_config.get_head_size() * model_config.dtype.itemsize)
