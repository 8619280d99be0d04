"""Memory and GPUs of this machine. Starts no process."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

GIB = 1024**3
RAY_KILLS_AT = 0.95
"""Used share of a node's memory above which Ray ends workers: its default."""
RAY_THRESHOLD = "RAY_memory_usage_threshold"


@dataclass(frozen=True)
class Gpu:
    """One CUDA device."""

    name: str
    memory_gib: float
    bfloat16: bool


@dataclass(frozen=True, slots=True)
class Machine:
    """GPUs, and bytes of host memory."""

    gpus: tuple[Gpu, ...]
    memory_free: int
    """Bytes that a run may take before Ray ends its processes."""
    memory_total: int


def cuda_devices() -> tuple[Gpu, ...]:
    """Return the GPUs that torch can use."""
    if importlib.util.find_spec("torch") is None:
        return ()
    import torch

    if not torch.cuda.is_available():
        return ()
    devices = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return tuple(Gpu(each.name, each.total_memory / GIB, each.major >= 8) for each in devices)


def available_memory_bytes() -> int:
    """Return the memory available to new processes, within the container's limit."""
    available = _meminfo("MemAvailable")
    limit, used = (_read(Path("/sys/fs/cgroup", name)).strip() for name in ("memory.max", "memory.current"))
    if limit.isdigit() and used.isdigit():
        return min(available, max(0, int(limit) - int(used)))
    return available


def memory_before_kills_bytes() -> int:
    """Return the memory that a run may take before Ray ends its processes.

    Ray does so when `RAY_KILLS_AT` of the memory is used, or the share in the environment variable `RAY_THRESHOLD`.
    """
    share = float(os.environ.get(RAY_THRESHOLD, RAY_KILLS_AT))
    limit = _read(Path("/sys/fs/cgroup/memory.max")).strip()
    total = min(_meminfo("MemTotal"), int(limit)) if limit.isdigit() else _meminfo("MemTotal")
    return max(0, available_memory_bytes() - int((1 - share) * total))


def total_memory_bytes() -> int:
    """Return the machine's memory with its swap, or the container's limit if that is smaller."""
    limit = _read(Path("/sys/fs/cgroup/memory.max")).strip()
    total = _meminfo("MemTotal") + _meminfo("SwapTotal")
    return min(total, int(limit)) if limit.isdigit() else total


def _meminfo(name: str) -> int:
    fields = dict(line.split(":", 1) for line in _read(Path("/proc/meminfo")).splitlines() if ":" in line)
    return int(fields.get(name, "0 kB").split()[0]) * 1024


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
