"""What a run needs against what this machine has: disk, and memory of each process. Loads no weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from common.config.gpus import is_part
from common.config.model import Config
from common.sizing.disk import disk_needs, folder_bytes, free_bytes
from common.sizing.machine import GIB, Machine, cuda_devices, memory_before_kills_bytes, total_memory_bytes
from common.sizing.memory import CUDA_BYTES, ProcessNeed, length_fault, longest_trainable, process_needs
from common.sizing.model_size import ModelSize, read_model_size
from learner.data.inputs import Inputs
from learner.preflight.machine import on_this_machine
from learner.preflight.report import Finding, error, summary, warning


def check_needs(config: Config, inputs: Inputs) -> Iterator[Finding]:
    """Find needs that exceed the machine, with the lengths of the rendered rows and contexts."""
    yield from find_needs(
        config,
        context_tokens=_context_tokens(inputs),
        longest_prompt=max(row.student_tokens for row in inputs.facts["data.train"]),
    )


def _context_tokens(inputs: Inputs) -> int:
    """Sum over all contexts; own contexts of rows that were not rendered count as the mean of the others."""
    rows = inputs.facts["data.train"]
    own = sum(row.own_tokens or 0 for row in rows) * len(inputs.train) // len(rows)
    return own + sum(len(context.ids) for context in inputs.contexts.values())


def find_needs(config: Config, *, context_tokens: int = 0, longest_prompt: int = 0) -> Iterator[Finding]:
    """Yield a summary line for each kind of process and for the disk, then errors and warnings.

    An error is certain: a disk that cannot hold the run's folder, or memory that no setting of a step avoids, on a
    machine that runs the whole run. Anything else that may not fit is a warning. `context_tokens` is the sum over all
    contexts, `longest_prompt` the student's longest prompt; 0 if unknown.
    """
    student = read_model_size(config.student.model)
    if student is None:
        yield summary("memory", f"unknown: no config.json and safetensors files of {config.student.model} here")
        return
    needs = process_needs(
        config, student, _teachers(config, student), context_tokens=context_tokens, longest_prompt=longest_prompt
    )
    machine, alone = gather_machine(wants_gpus=any(need.gpus for need in needs)), on_this_machine()
    yield from _memory(config, student, needs, machine)
    yield from _memory_faults(needs, machine, alone=alone)
    rank = next(need for need in needs if need.name == "rank")
    if rank.gpus and machine.gpus and longest_prompt and rank.certain <= (room := _gpu(machine, rank.gpus)):
        fault = length_fault(config, student, room, longest_prompt + config.rollout.max_tokens)
        if fault is not None and fault.certain:  # otherwise the rank's memory is a warning already
            yield (error if alone else warning)(fault.text)
    yield from _disk(config, student)


def gather_machine(*, wants_gpus: bool) -> Machine:
    """Facts about this machine; torch is imported only if the run wants GPUs."""
    return Machine(cuda_devices() if wants_gpus else (), memory_before_kills_bytes(), total_memory_bytes())


def _teachers(config: Config, student: ModelSize) -> dict[str, ModelSize]:
    sizes = {
        name: student if teacher.model is None else read_model_size(teacher.model)
        for name, teacher in config.named_teachers().items()
    }
    return {name: size for name, size in sizes.items() if size is not None}


def _disk(config: Config, student: ModelSize) -> Iterator[Finding]:
    needs = disk_needs(config, student)
    has = free_bytes(config.run.path) + folder_bytes(config.run.path)
    needed = f"{_gib(sum(needs.values()))} GiB at its fullest ({_parts(needs)}), {_gib(has)} free"
    yield summary("disk", needed)
    by_time = needs.get("checkpoints", 0) if config.checkpoint.every is None else 0  # one that fails costs a warning
    if sum(needs.values()) > has >= sum(needs.values()) - by_time:
        yield warning(
            f"run.dir: {config.run.path} takes {needed}: checkpoints may fail, and an interrupted run may not resume"
        )
    elif sum(needs.values()) > has:
        yield error(
            f"run.dir: {config.run.path} takes {needed}: free some, choose another run.dir, lower checkpoint.keep or "
            "write fewer exports"
        )


def _memory(config: Config, student: ModelSize, needs: Sequence[ProcessNeed], machine: Machine) -> Iterator[Finding]:
    for need in needs:
        if not need.parts:
            continue
        name, size = max(need.peak.items(), key=lambda part: part[1])
        number = f"{need.count} x " if need.count > 1 else ""
        where = (
            ""
            if not need.gpus
            else " on GPU, no GPU here"
            if not machine.gpus
            else f" of {_gib(_gpu(machine, need.gpus))} on GPU"
        )
        yield summary(
            "memory", f"{number}{need.name} {_gib(need.total)} GiB{where} ({_parts({**need.parts, name: size})})"
        )
    total = sum(need.count * need.host_total for need in needs)
    yield summary("memory", f"of the host, all processes: {_gib(total)} GiB, {_gib(machine.memory_free)} free")
    rank = next(need for need in needs if need.name == "rank")
    if not rank.gpus or machine.gpus:
        room = _gpu(machine, rank.gpus) if rank.gpus else machine.memory_free // rank.count
        tokens = min(longest_trainable(config, student, room), student.max_tokens)
        yield summary("memory", f"a rank can train sequences of about {tokens:,} tokens")


def _memory_faults(needs: Sequence[ProcessNeed], machine: Machine, *, alone: bool) -> Iterator[Finding]:
    total = sum(need.count * need.host_total for need in needs)
    certain = sum(need.count * need.host_certain for need in needs)
    if alone and certain > machine.memory_total:
        yield error(
            f"the run needs at least {_gib(certain)} GiB of host memory, this machine has "
            f"{_gib(machine.memory_total)}: {REMEDY}"
        )
    elif total > machine.memory_free:
        yield warning(
            f"the run needs about {_gib(total)} GiB of host memory, {_gib(machine.memory_free)} are free here before "
            "Ray ends processes for want of memory"
        )
    for need in (need for need in needs if need.gpus and machine.gpus):
        room = _gpu(machine, need.gpus)
        part = f"{need.gpus:g} of " if is_part(need.gpus) else ""
        has = f"{part}a GPU of this machine has {_gib(room)}"
        if alone and need.certain > room:
            yield error(
                f"a {need.name} needs at least {_gib(need.certain)} GiB ({_parts(need.parts)}), {has}: {REMEDY}"
            )
        elif need.total > room:
            yield warning(f"a {need.name} needs about {_gib(need.total)} GiB, {has}")


REMEDY = "a smaller model, learner.lora, learner.cpu_offload, or learner.zero_stage 3 over more learner.ranks"


def _gpu(machine: Machine, gpus: float) -> int:
    """Bytes of the smallest GPU, or of the part `gpus` of it, without CUDA's own."""
    return int(min(gpu.memory_gib for gpu in machine.gpus) * GIB * (gpus if is_part(gpus) else 1)) - CUDA_BYTES


def _parts(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {_gib(size)}" for name, size in parts.items())


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}"
