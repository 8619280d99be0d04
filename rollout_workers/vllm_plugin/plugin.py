"""Plugin that vLLM loads in each of its processes (entry point group ``vllm.general_plugins``)."""

from __future__ import annotations

import ctypes
import multiprocessing
import signal

from rollout_workers.vllm_plugin.sync_info import WEIGHT_TRANSFER

PR_SET_PDEATHSIG = 1


def register() -> None:
    """Register this project's weight transfer, and make vLLM's child processes die with their parent.

    Runs once or more per process. A killed actor cannot shut its engine down: without the signal the engine would
    live on and hold its memory.
    """
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if WEIGHT_TRANSFER not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            WEIGHT_TRANSFER, "rollout_workers.vllm_plugin.weight_transfer", "SyncWeightTransferEngine"
        )
    if multiprocessing.parent_process() is not None:
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
