"""A vLLM engine that only scores: token ids in, whole requests out, one caller. All that knows vLLM's classes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray

from common.config.model import TeacherConfig
from teacher_server.backends.base import BackendError, BackendLost
from teacher_server.backends.vllm.worker import EXTENSION, FIXED_COLUMNS

CPU_CHUNK_TOKENS = 2048
"""Of one engine step on CPU, where the logits of all its prompt tokens exist at a time."""


@dataclass(frozen=True, slots=True, eq=False)
class Ask:
    """One request: log-probs of the tokens of ``ids`` after the first `start` + 1, in one of two ways, or none.

    `salt` names the part of the engine's prefix cache that may be read and written; None: nothing is read from it.
    """

    ids: list[int]
    salt: str | None = None
    start: int = 0
    fixed_ids: NDArray[Any] | None = None
    top_k_columns: int | None = None


class ScoringEngine:
    """A running engine; `close` ends its processes. So does the end of this process, however it comes."""

    def __init__(self, model: str, config: TeacherConfig) -> None:
        """Load the model: tens of seconds. Raises BackendError."""
        self._model, self._config = model, config
        gpu = torch.cuda.is_available()
        wanted = config.dtype if config.dtype != "auto" else ("bfloat16" if gpu else "float32")
        self._llm = self._start(wanted, gpu)
        resolved = self._llm.llm_engine.vllm_config
        model_config = resolved.model_config
        self.fixed_ids = bool(resolved.use_v2_model_runner)
        self.dtype = str(model_config.dtype).removeprefix("torch.")
        self.vocab_size = int(model_config.get_vocab_size())
        # One place is vLLM's: a request generates a token, which nobody looks at.
        self.max_sequence_tokens = int(model_config.max_model_len) - 1
        self.block_tokens = int(resolved.cache_config.block_size)
        self.cache_tokens = int(resolved.cache_config.num_gpu_blocks) * self.block_tokens
        self.token_bytes = _key_value_bytes(model_config, resolved.parallel_config)
        self._llm.collective_rpc("opcd_install_scoring", args=(self.fixed_ids,))

    def _start(self, dtype: str, gpu: bool) -> Any:
        # vLLM reads these before anything else; the second only matters on CPU.
        os.environ["VLLM_NO_USAGE_STATS"] = "1"
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        # A fork would inherit locks of torch's and the server's threads.
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
        config = self._config
        if config.threads is not None:
            os.environ["OMP_NUM_THREADS"] = str(config.threads)
        try:
            from vllm import LLM
            from vllm.v1.executor.uniproc_executor import UniProcExecutor
        except ImportError as error:
            raise BackendError(f"teacher.backend `vllm` needs vLLM, which cannot be imported here: {error}") from error
        # On CPU vLLM would put one worker, too, into a process of its own, to set OpenMP up, and wait for it on a core
        # of its own. The engine's process is set up by the variables above.
        alone = not gpu and config.tensor_parallel_size == 1
        executor = {"distributed_executor_backend": UniProcExecutor} if alone else {}
        try:
            return LLM(model=self._model, dtype=dtype, **engine_settings(config, gpu=gpu), **executor)
        except (RuntimeError, ValueError) as error:
            raise BackendError(f"vLLM cannot start: {error}") from error

    def run(self, asks: Sequence[Ask]) -> list[Any]:
        """vLLM's ``RequestOutput`` of every request, in order. Raises BackendLost where the engine's processes died."""
        from vllm.v1.engine.exceptions import EngineDeadError

        prompts = [
            {"prompt_token_ids": ask.ids} | ({} if ask.salt is None else {"cache_salt": ask.salt}) for ask in asks
        ]
        try:
            return list(self._llm.generate(prompts, [sampling(ask) for ask in asks], use_tqdm=False))
        except EngineDeadError as error:
            raise BackendLost("the vLLM engine died (its own log says why)") from error

    def close(self) -> None:
        """End the engine's processes."""
        self._llm.llm_engine.engine_core.shutdown()


def engine_settings(config: TeacherConfig, *, gpu: bool) -> dict[str, Any]:
    """Arguments of ``vllm.LLM`` beside model and dtype."""
    longest = config.max_sequence_tokens
    return {
        # Token ids in, token ids out: text never appears.
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "tensor_parallel_size": config.tensor_parallel_size,
        "max_model_len": None if longest is None else longest + 1,
        "max_num_batched_tokens": max(config.batch_tokens, 256) if gpu else CPU_CHUNK_TOKENS,
        "max_num_seqs": 1 if config.batch_items == 1 else 128,
        "max_logprobs": FIXED_COLUMNS + 3 * config.max_k,
        "logprobs_mode": "raw_logprobs",
        # What was cached before shows in the last bit of a log-prob.
        "enable_prefix_caching": config.batch_items != 1,
        # Graphs are for decoding, one token at a time: nothing is decoded here.
        "enforce_eager": True,
        "worker_extension_cls": EXTENSION,
        **(
            {"gpu_memory_utilization": config.gpu_memory_utilization}
            if gpu
            else {"kv_cache_memory_bytes": config.context_cache_bytes}
        ),
    }


def sampling(ask: Ask) -> Any:
    """vLLM's ``SamplingParams`` for a request."""
    from vllm import SamplingParams

    scored = ask.fixed_ids is not None
    return SamplingParams(
        max_tokens=1,
        temperature=0.0,
        ignore_eos=True,
        detokenize=False,
        flat_logprobs=True,
        prompt_logprobs=ask.top_k_columns,
        prompt_logprob_token_ids=ask.fixed_ids,
        prompt_logprob_start=ask.start if scored else None,
        skip_reading_prefix_cache=ask.salt is None,
    )


def _key_value_bytes(model_config: Any, parallel_config: Any) -> int:
    """Of one token in all layers and on all GPUs."""
    heads = model_config.get_num_kv_heads(parallel_config) * parallel_config.tensor_parallel_size
    layers = model_config.get_num_layers(parallel_config)
    return int(2 * layers * heads * model_config.get_head_size() * model_config.dtype.itemsize)
