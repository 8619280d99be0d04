"""The check of model families: what cannot be right is refused by name, from the configurations alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from common.config.model import Config, ConfigError
from common.data.model_lookup import load_full_config
from common.models.families import family_faults, model_on_meta
from learner.preflight.models import is_on_this_machine
from learner.preflight.report import Finding, error


def check_families(config: Config) -> Iterator[Finding]:
    """Find models that the learner or a teacher that the run starts cannot compute exactly."""
    student = config.student
    yield from _faults("student", student.model, student.max_sequence_tokens, trained=config)
    for name, teacher in config.named_teachers().items():
        if teacher.url is None and teacher.kind != "base" and teacher.backend == "transformers":
            key = "teacher" if name == "default" else f"teachers.{name}"
            yield from _faults(key, teacher.model or student.model, teacher.max_sequence_tokens)


def _faults(key: str, model: str, limit: int | None, *, trained: Config | None = None) -> Iterator[Finding]:
    if not is_on_this_machine(model):
        return
    try:
        built = model_on_meta(load_full_config(model))
        faults = [*family_faults(built, limit), *(training_faults(built, trained) if trained is not None else ())]
    except (ConfigError, ValueError) as fault:
        faults = [str(fault).removeprefix(f"{model} ")]
    for text in faults:
        yield error(f"{key}.model {model}: {text.replace('set max_sequence', f'set {key}.max_sequence')}")


def training_faults(model: Any, config: Config) -> Iterator[str]:
    """Yield what the learner cannot train or publish. Inserts adapters into `model`, on the meta device."""
    from learner.trainer.experts import routers
    from learner.trainer.export import WeightView
    from learner.trainer.lora import add_adapters
    from learner.trainer.policy import Policy

    quantization = getattr(model.config, "quantization_config", None)
    if quantization is not None:
        method = dict(quantization).get("quant_method", "an unknown method")
        yield f"its weights are quantised ({method}), which training cannot change: use a checkpoint in bfloat16"
    try:
        Policy(model, chunk_tokens=1)
        WeightView(model)
        if config.learner.lora is not None:
            add_adapters(model, config.learner.lora)
    except ValueError as fault:
        yield str(fault)
    if config.sync.expert_mismatch and not routers(model):
        yield f"{type(model).__name__} has no experts: remove sync.expert_mismatch"
