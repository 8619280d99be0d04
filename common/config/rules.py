"""What the sections of a configuration must be to each other. Pure: each rule is a function that names its fault."""

from __future__ import annotations

from collections.abc import Iterator

from common.config.model import Config


def fault(config: Config) -> str | None:
    """The first rule that `config` breaks, in words that name the keys and the remedy; None where it breaks none."""
    rules = (_loss, _source, _importance, _learner, _sync, _evaluation, _teachers, _base_teacher, _workers, _colocated)
    return next((found for rule in rules for found in rule(config)), None)


def _loss(config: Config) -> Iterator[str]:
    loss, rollout = config.loss, config.rollout
    if loss.form == "exact" and loss.support != "student":
        yield f"loss.form: `exact` is over the whole vocabulary, so loss.support is `student`, not `{loss.support}`"
    if rollout.topk_from == "learner" and loss.support == "teacher":
        yield "rollout.topk_from: `learner` picks ids that loss.support `teacher` does not use"
    if loss.form == "policy_gradient" and loss.temperature != rollout.temperature:
        yield (
            f"loss.form: `policy_gradient` compares log-probs of the sampler and the learner, so loss.temperature "
            f"({loss.temperature}) must equal rollout.temperature ({rollout.temperature})"
        )


def _source(config: Config) -> Iterator[str]:
    rollout, loss, teacher = config.rollout, config.loss, config.teacher
    if rollout.source == "student":
        if loss.form == "nll":
            yield (
                "loss.form: `nll` of the student's own answers teaches it nothing; it is for those of the teacher, "
                "rollout.source `teacher`"
            )
        if rollout.answers_file is not None:
            yield "rollout.answers_file is for the teacher's answers, rollout.source `teacher`"
        return
    if loss.support != "teacher" and rollout.topk_from == "engine":
        yield (
            f"rollout.source `teacher`: no engine of the student made the answers, so none has picked its ids for "
            f"loss.support `{loss.support}`; set loss.support to `teacher`, or rollout.topk_from to `learner`"
        )
    if loss.form == "policy_gradient" or loss.importance_clip is not None:
        yield (
            "rollout.source `teacher`: loss.form `policy_gradient` and loss.importance_clip compare the student with "
            "the one that sampled, which is not the student here"
        )
    if rollout.max_staleness or rollout.oversample_fraction:
        yield "rollout.source `teacher` has its answers from the start: rollout.max_staleness and oversample_fraction must be 0"
    if config.teachers or teacher.kind in ("live", "ema"):
        yield "rollout.source `teacher` takes one teacher that keeps its weights: no `teachers`, `live` or `ema`"
    if teacher.url is not None and teacher.model is None:
        yield "rollout.source `teacher`: the server at teacher.url scores only, teacher.model must say who answers"


def _importance(config: Config) -> Iterator[str]:
    loss, rollout = config.loss, config.rollout
    if loss.importance_clip is None:
        return
    if loss.form == "policy_gradient":
        yield "loss.importance_clip: `policy_gradient` has a ratio of its own, see loss.ratio_clip"
    if loss.temperature != rollout.temperature or rollout.top_p != 1:
        yield (
            f"loss.importance_clip compares log-probs of the sampler and the learner, so loss.temperature "
            f"({loss.temperature}) must equal rollout.temperature ({rollout.temperature}) and rollout.top_p "
            f"({rollout.top_p}) be 1"
        )


def _learner(config: Config) -> Iterator[str]:
    if config.learner.cpu_offload and config.learner.zero_stage == 0:
        yield "learner.cpu_offload needs learner.zero_stage 1, 2 or 3"


def _sync(config: Config) -> Iterator[str]:
    if config.sync.delta and config.sync.backend != "gloo":
        yield f"sync.delta: goes over sync.backend `gloo` only, not `{config.sync.backend}`"
    limit_s = config.learner.collective_timeout_s
    if config.learner.ranks > 1 and limit_s <= config.sync.timeout_s:
        yield (
            f"learner.collective_timeout_s ({limit_s:g}) must be longer than sync.timeout_s "
            f"({config.sync.timeout_s:g}): the other ranks wait while rank 0 waits for an engine"
        )


def _evaluation(config: Config) -> Iterator[str]:
    if config.eval.every and config.data.valid is None:
        yield (
            f"eval.every is {config.eval.every} and data.valid is not set: only rows that are not reported on may be "
            "looked at while training"
        )

    settings = config.eval
    if settings.temperature == 0 and (settings.samples > 1 or settings.top_p != 1 or settings.top_k):
        yield (
            f"eval.temperature 0 is greedy, every answer to a row the same: eval.samples ({settings.samples}), "
            f"eval.top_p ({settings.top_p}) and eval.top_k ({settings.top_k}) need one above 0"
        )


def _teachers(config: Config) -> Iterator[str]:
    if "default" in config.teachers:
        yield "teachers: `default` is the name of the `teacher` section"
    for name, teacher in config.named_teachers().items():
        where = "teacher" if name == "default" else f"teachers.{name}"
        if config.loss.top_k > teacher.max_k:
            yield f"loss.top_k {config.loss.top_k} is larger than {where}.max_k {teacher.max_k}"
        own = teacher.url is None and teacher.model in (None, config.student.model)
        if teacher.kind != "frozen" and not own:
            yield (
                f"{where}.kind `{teacher.kind}` is the student's own weights, private to this run: it takes neither "
                f"{where}.url nor another {where}.model"
            )
        if name != "default" and teacher.kind == "base":
            yield f"{where}.kind `base` is computed by the learner: only `teacher` can be it, and then the only one"


def _base_teacher(config: Config) -> Iterator[str]:
    if config.teacher.kind != "base":
        return
    if config.learner.lora is None:
        yield "teacher.kind `base` is the student without its adapters: it needs learner.lora"
    if config.teachers:
        yield "teacher.kind `base` is computed by the learner for every row: `teachers` must be empty"
    if config.loss.support != "student":
        yield "teacher.kind `base` scores at the student's ids: loss.support must be `student`"


def _workers(config: Config) -> Iterator[str]:
    rollout = config.rollout
    if rollout.max_workers is None:
        return
    if rollout.max_workers < rollout.workers:
        yield (
            f"rollout.max_workers ({rollout.max_workers}) is less than rollout.workers ({rollout.workers}), which the "
            "run begins with"
        )
    if rollout.colocated:
        yield "rollout.max_workers: a worker that joins has no rank to share its GPU with (rollout.colocated)"


def _colocated(config: Config) -> Iterator[str]:
    rollout, ranks = config.rollout, config.learner.ranks
    if not rollout.colocated:
        return
    if rollout.workers != ranks or rollout.tensor_parallel_size != 1:
        yield (
            f"rollout.colocated pairs one worker with one rank: rollout.workers ({rollout.workers}) must equal "
            f"learner.ranks ({ranks}), and rollout.tensor_parallel_size be 1"
        )
    if rollout.max_staleness or rollout.topk_from == "learner" or config.teacher.kind == "base":
        yield (
            "rollout.colocated takes turns: rollout.max_staleness must be 0, rollout.topk_from `engine`, and "
            "teacher.kind not `base`"
        )
