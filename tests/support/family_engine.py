"""The engine's column of docs/models.md: vLLM on CPU against the learner, before and after a weight sync.

Engines run in one child process, which takes family after family: starting vLLM's processes anew takes ten times as
long as a tiny model.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from common.protocol.schema import TokenSequence, as_ids

SIZES = ((4, 9), (70, 50), (30, 40))
"""Tokens of prompt and response of the probe: below and above every window and every original length."""
MAX_CHARACTERS = 100
"""Length of a cell; a longer reason is cut."""
MOVE = 0.02
"""Standard deviation of the change of every trained weight, whose own is 0.12."""


class FamilyEngines:
    """Computes cells; a process that dies is replaced."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    def cell(self, folder: Path) -> str:
        """What an engine does with the model in `folder`: `exact`, or where a run would stop."""
        cell = self._run(folder, "float32")
        if "bfloat16" in cell or "BF16" in cell:  # kernels that exist for it only
            return self._run(folder, "bfloat16") + " in bfloat16"
        return shorten(cell, MAX_CHARACTERS, placeholder=" …")

    def _run(self, folder: Path, dtype: Literal["float32", "bfloat16"]) -> str:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        try:
            cell, reusable = self._pool.submit(_cell, folder, dtype).result()
        except BrokenProcessPool:
            cell, reusable = "refused: vLLM's process dies", False
        if not reusable:
            self.close()
        return cell

    def close(self) -> None:
        """End the process."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def _cell(folder: Path, dtype: Literal["float32", "bfloat16"]) -> tuple[str, bool]:
    """The cell, and whether this process can take another family."""
    import os

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    import torch

    from learner.loop.parity import ParityError, ParityGate, parity_bounds
    from tests.support.family_matrix import load_learner

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config, inference = load_learner(folder, dtype=dtype)
    rng = np.random.default_rng(3)
    probe = [TokenSequence(*(as_ids(rng.integers(0, 490, n)) for n in sizes)) for sizes in SIZES]
    before, experts_before = inference.logprobs(probe), inference.experts(probe)
    with torch.no_grad():
        for parameter in inference._policy.parameters():
            if parameter.requires_grad:
                parameter.add_(MOVE * torch.randn_like(parameter))
    after, experts_after = inference.logprobs(probe), inference.experts(probe)
    try:
        engine = _start(folder, config)
    except Exception as error:  # noqa: BLE001, whatever vLLM raises for a model that it does not start
        return f"refused: {_reason(error)}", True
    # vLLM changes transformers' own class of such a model, so that the learner could not run it any more.
    reusable = not engine.vllm_config.model_config.using_transformers_backend()
    try:
        gate = ParityGate(parity_bounds(config.sync, dtype))
        gate.begin(_logprobs(engine, probe), before)
        mismatch = _expert_mismatch(engine, probe, experts_before)
        _sync(engine, config, inference._policy.model, folder)
        gate.check(1, _logprobs(engine, probe), after)
        mismatch += _expert_mismatch(engine, probe, experts_after)
    except ParityError as error:
        print(folder.name, error, flush=True)
        at_start = "before the first step" in str(error)
        return f"stops: {'computes it otherwise' if at_start else 'old weights'}", reusable
    except Exception as error:  # noqa: BLE001, of a worker, re-raised by vLLM in any type
        return f"stops: {_reason(error)}", reusable
    finally:
        _stop(engine)
    if any(mismatch):
        print(folder.name, dtype, "other experts, by layer, before and after:", mismatch, flush=True)
        if dtype == "float32":
            return "stops: chooses other experts", reusable
    return "exact", reusable


def _reason(error: BaseException) -> str:
    if "failed to be inspected" in str(error):
        return "its code needs torchvision"  # vLLM logs the import error and drops it
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return " ".join(f"{type(error).__name__}: {error}".split())


def _start(folder: Path, config: Any) -> Any:
    from vllm.model_executor.models import registry
    from vllm.v1.engine.llm_engine import LLMEngine

    from rollout_workers.engine.engine import _set_environment, engine_args
    from rollout_workers.vllm_plugin.plugin import register

    # vLLM inspects each class in another process, which imports vLLM first: half a minute a family.
    registry._run_in_subprocess = lambda call: call()  # type: ignore[assignment]
    rollout = config.rollout.model_copy(update={"threads": 1, "kv_cache_gib": 1})
    _set_environment(rollout)
    register()
    args = engine_args(str(folder), config.model_copy(update={"rollout": rollout}), max_logprobs=8)
    _spare_imports()
    return LLMEngine.from_engine_args(args, enable_multiprocessing=False)


def _spare_imports() -> None:
    """Exempt what is imported by now from garbage collection: nine tenths of an engine's time were vLLM's collections.

    vLLM's calls to freeze would keep the caches of all engines, and its calls to unfreeze would undo this one.
    """
    import gc

    if not gc.get_freeze_count():
        gc.collect()
        gc.freeze()
        gc.freeze = gc.unfreeze = lambda: None


def _stop(engine: Any) -> None:
    import gc

    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    engine.engine_core.shutdown()
    del engine
    cleanup_dist_env_and_memory()
    gc.collect()


def _logprobs(engine: Any, probe: list[TokenSequence]) -> list[NDArray[np.float32]]:
    from vllm import SamplingParams

    params = SamplingParams(
        max_tokens=1, temperature=0.0, prompt_logprobs=0, flat_logprobs=True, detokenize=False, ignore_eos=True,
        skip_reading_prefix_cache=True,
    )  # fmt: skip
    for index, sequence in enumerate(probe):
        ids = [*sequence.prompt_ids.tolist(), *sequence.response_ids.tolist()]
        engine.add_request(str(index), {"prompt_token_ids": ids}, params.clone())
    found: dict[int, NDArray[np.float32]] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            flat, sequence = output.prompt_logprobs, probe[int(output.request_id.partition("-")[0])]
            if output.finished:
                starts = flat.start_indices[len(sequence.prompt_ids) :]
                assert [flat.token_ids[start] for start in starts] == sequence.response_ids.tolist()
                found[int(output.request_id.partition("-")[0])] = np.asarray(
                    [flat.logprobs[start] for start in starts], dtype=np.float32
                )
    return [found[index] for index in range(len(probe))]


def _expert_mismatch(
    engine: Any, probe: list[TokenSequence], learner: list[dict[int, NDArray[np.int64]]]
) -> list[float]:
    """Share of other experts by layer; empty for a model without experts.

    `RolloutEngine.experts` needs a GPU. Here each sequence runs alone, and the choices are noted where vLLM's own
    recorder notes them.
    """
    from vllm.model_executor.layers.fused_moe.layer import MoERunner

    from learner.loop.expert_mismatch import expert_mismatch

    if not learner[0]:
        return []
    (model,) = engine.collective_rpc(lambda worker: worker.get_model())
    chosen: dict[int, Any] = {}
    runners = [module for module in model.modules() if isinstance(module, MoERunner)]
    for runner in runners:
        runner.router.set_capture_fn(lambda ids, layer=runner.layer_id: chosen.update({layer: ids.numpy().copy()}))
    found = []
    for sequence in probe:
        _logprobs(engine, [sequence])
        tokens = len(sequence.prompt_ids) + len(sequence.response_ids)
        rows = np.zeros((tokens, max(chosen) + 1, len(next(iter(chosen.values()))[0])), dtype=np.int64)
        for layer, ids in chosen.items():
            rows[:, layer] = ids[:tokens]
        found.append(rows[len(sequence.prompt_ids) - 1 : -1])
    for runner in runners:
        runner.router.set_capture_fn(None)
    return list(expert_mismatch(found, learner).values())


def _sync(engine: Any, config: Any, model: Any, folder: Path) -> None:
    """One sync through a shared folder: no group has to be formed."""
    from common.weight_sync.manifest import SyncManifest
    from learner.publishing.sender import open_sender
    from learner.trainer.export import WeightView
    from rollout_workers.vllm_plugin.sync_info import init_info, update_info

    sync = config.sync.model_copy(update={"backend": "file", "folder": folder.with_name(f"{folder.name}-sync")})
    view = WeightView(model)
    manifest = SyncManifest(view.specs, 100_000, 1)
    open_sender(sync, "127.0.0.1", 1, 2).send(view.gathered(100_000), manifest)
    engine.collective_rpc("init_weight_transfer_engine", args=(init_info(sync, "127.0.0.1", 1, 1, 2),))
    engine.collective_rpc("start_weight_update")
    engine.collective_rpc("update_weights", args=(update_info(manifest),))
    engine.collective_rpc("finish_weight_update")
