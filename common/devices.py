"""The GPUs that a process sees."""

from __future__ import annotations

import os
from collections.abc import Sequence

from common.config.gpus import is_part


def see_only(gpu_ids: Sequence[object]) -> None:
    """Hide the node's GPUs from this process and its later children if `gpu_ids`, those reserved for it, is empty.

    Call it before CUDA starts. Ray sets CUDA_VISIBLE_DEVICES for an actor that reserves GPUs, and leaves the variable
    alone for one that reserves none, which then sees all of them.
    """
    if not gpu_ids:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def limit_memory(gpus: float) -> None:
    """Have torch take at most this process's part of a shared GPU's memory; `gpus` of 1 or more is no part."""
    if is_part(gpus):
        import torch

        torch.cuda.set_per_process_memory_fraction(gpus)


def memory_bytes(gpus: float) -> int:
    """Memory that this process may take on its GPU, or on its part of it; 0 without a GPU."""
    if not gpus:
        return 0
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory * (gpus if is_part(gpus) else 1))
