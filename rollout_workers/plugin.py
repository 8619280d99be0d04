"""What vLLM loads in every one of its processes (entry point group ``vllm.general_plugins``)."""

from __future__ import annotations

import ctypes
import multiprocessing
import signal

PR_SET_PDEATHSIG = 1


def register() -> None:
    """Make the gloo weight transfer known, and let vLLM's children die with the process that started them.

    Called once or more per process. An actor that is killed cannot shut its engine down; without this its engine
    would live on and hold the memory.
    """
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if "opcd_gloo" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            "opcd_gloo", "rollout_workers.weight_transfer", "GlooWeightTransferEngine"
        )
    if multiprocessing.parent_process() is not None:
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
