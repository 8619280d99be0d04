"""The check of the student against vLLM: what its CPU build refuses, and what it computes otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from common.config.model import Config
from common.data.model_lookup import load_full_config
from common.models.engines import CPU_BFLOAT16, OTHERWISE, cpu_fault, engine_fault, text_type
from learner.preflight.machine import on_this_machine
from learner.preflight.models import is_on_this_machine
from learner.preflight.report import Finding, error, warning


def check_engines(config: Config) -> Iterator[Finding]:
    """Find a student that the engines do not compute, or that the check of version 0 would end the run for."""
    student = config.student
    if not is_on_this_machine(student.model):
        return
    settings = load_full_config(student.model)
    fault = engine_fault(settings)
    on_cpu = not config.rollout.gpus_per_worker
    if fault is None and on_cpu:
        torchvision = find_spec("torchvision") is not None or not on_this_machine()
        fault = cpu_fault(settings, student.dtype, torchvision=torchvision)
    if fault is not None:
        yield error(f"student.model {student.model}: {fault}")
    if fault is None and text_type(settings) in (*OTHERWISE, *(CPU_BFLOAT16 if on_cpu else ())):
        yield warning(
            f"student.model {student.model}: vLLM 0.32.0 computed {text_type(settings)} otherwise than transformers; "
            "if it does so for this checkpoint, the run ends before its first step"
        )
