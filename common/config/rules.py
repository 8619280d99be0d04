"""Rules between the sections of a configuration. Pure: each rule yields the messages of what breaks it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from common.config.gpus import is_part, member_gpus, parts_of_one_gpu, reserved_gpus
from common.config.inputs import ContextConfig, DataConfig, EvalConfig, StudentConfig, TeacherConfig
from common.config.training import LearnerConfig, LossConfig, RolloutConfig, SyncConfig, decay_steps


def loss_rules(loss: LossConfig, rollout: RolloutConfig) -> Iterator[str]:
    if loss.form == "exact" and loss.support != "student":
        yield f"loss.form `exact` covers the whole vocabulary: set loss.support to `student`, not `{loss.support}`"
    if rollout.topk_from == "learner" and loss.support == "teacher":
        yield "rollout.topk_from `learner` picks ids that loss.support `teacher` does not use"
    if loss.clip_per_entry is not None and loss.form in ("policy_gradient", "nll"):
        yield f"loss.clip_per_entry bounds the terms of a divergence; loss.form `{loss.form}` has one term a token"
    if loss.form == "policy_gradient":
        yield from _comparable_logprobs("loss.form `policy_gradient`", loss, rollout)


def _comparable_logprobs(key: str, loss: LossConfig, rollout: RolloutConfig) -> Iterator[str]:
    """A ratio of learner to sampler is biased unless both log-probs are of one temperature and no nucleus."""
    if loss.temperature != rollout.temperature or rollout.top_p != 1:
        yield (
            f"{key} compares log-probs of sampler and learner, so loss.temperature ({loss.temperature}) must equal "
            f"rollout.temperature ({rollout.temperature}) and rollout.top_p ({rollout.top_p}) must be 1"
        )


def source_rules(
    rollout: RolloutConfig,
    loss: LossConfig,
    teacher: TeacherConfig,
    *,
    more_teachers: bool,
    answering_model: str | None,
) -> Iterator[str]:
    if rollout.source == "teacher" and rollout.mix is not None:
        yield "rollout.mix has responses of both: it needs rollout.source `student`"
    if not rollout.teacher_answers:
        if loss.form == "nll":
            yield "loss.form `nll` of the student's own answers teaches nothing: set rollout.source to `teacher`"
        if rollout.answers_file is not None:
            yield "rollout.answers_file holds the teacher's answers: it needs rollout.source `teacher` or rollout.mix"
        return
    key = "rollout.source `teacher`" if rollout.mix is None else "rollout.mix"
    if loss.support != "teacher" and rollout.topk_from == "engine":
        yield (
            f"{key}: no student engine samples the teacher's answers, so no engine picks the ids of loss.support "
            f"`{loss.support}`; set loss.support to `teacher`, or rollout.topk_from to `learner`"
        )
    if loss.form == "policy_gradient" or loss.importance_clip is not None or loss.reward_weight:
        yield (
            f"{key}: loss.form `policy_gradient`, loss.importance_clip and loss.reward_weight need answers sampled by "
            "the student"
        )
    if rollout.mix is not None and loss.form == "nll":
        yield "rollout.mix: loss.form `nll` of the student's own answers teaches nothing"
    if rollout.max_staleness or rollout.oversample_fraction:
        yield (
            f"{key}: the teacher's answers exist before training, so rollout.max_staleness and "
            "rollout.oversample_fraction must be 0"
        )
    if more_teachers or teacher.kind in ("live", "ema"):
        yield f"{key} needs a single teacher with fixed weights: no `teachers`, `live` or `ema`"
    if answering_model is None:
        where, remedy = "teacher.url", "set teacher.model to the model that answers"
        if teacher.backend == "remote":
            where, remedy = "teacher.backend `remote`", "choose a backend that loads the model that answers"
        yield f"{key}: {where} only scores; {remedy}"


def data_rules(data: DataConfig, teachers: Mapping[str, TeacherConfig], loss: LossConfig) -> Iterator[str]:
    total = sum(one.share for one in data.mix.values())
    if total >= 1:
        yield f"data.mix: the shares add up to {total:g} and leave nothing to data.train: they must stay below 1"
    if "train" in data.mix:
        yield "data.mix: `train` is the name of data.train itself"
    for name, one in data.mix.items():
        if one.teacher is not None and one.teacher not in teachers:
            yield (
                f"data.mix.{name}.teacher {one.teacher!r} is no teacher of the run, which has "
                f"{', '.join(teachers)} (see `teachers`)"
            )
        if loss.form in ("policy_gradient", "nll") and one.loss.model_dump(exclude={"weight"}, exclude_none=True):
            yield (
                f"data.mix.{name}.loss changes a divergence, and loss.form is `{loss.form}`: leave it `weight` alone, "
                "or choose another loss.form"
            )


def importance_rules(loss: LossConfig, rollout: RolloutConfig) -> Iterator[str]:
    if loss.importance_clip is None:
        return
    if loss.form == "policy_gradient":
        yield "loss.importance_clip: loss.form `policy_gradient` has its own ratio, use loss.ratio_clip"
    yield from _comparable_logprobs("loss.importance_clip", loss, rollout)


def reward_rules(loss: LossConfig, rollout: RolloutConfig) -> Iterator[str]:
    if not loss.reward_weight:
        if loss.reward is not None:
            yield "loss.reward has no effect while loss.reward_weight is 0"
        return
    if rollout.samples_per_prompt < 2:
        yield (
            f"loss.reward_weight compares the responses to a prompt: rollout.samples_per_prompt "
            f"({rollout.samples_per_prompt}) must be 2 or more"
        )
    if rollout.max_staleness or rollout.oversample_fraction:
        yield (
            "loss.reward_weight needs all responses to a prompt in one step: rollout.max_staleness and "
            "rollout.oversample_fraction must be 0"
        )
    yield from _comparable_logprobs("loss.reward_weight", loss, rollout)


def learner_rules(learner: LearnerConfig, sync: SyncConfig) -> Iterator[str]:
    if learner.cpu_offload and learner.zero_stage == 0:
        yield "learner.cpu_offload needs learner.zero_stage 1, 2 or 3"
    if sync.delta and sync.backend not in ("auto", "gloo"):
        yield f"sync.delta needs sync.backend `gloo`, not `{sync.backend}`"
    limit_s = learner.collective_timeout_s
    if learner.ranks > 1 and limit_s <= sync.timeout_s:
        yield (
            f"learner.collective_timeout_s ({limit_s:g}) must be longer than sync.timeout_s ({sync.timeout_s:g}): the "
            "other ranks wait while rank 0 waits for an engine"
        )


def schedule_rules(learner: LearnerConfig) -> Iterator[str]:
    if learner.min_lr > learner.lr:
        yield f"learner.min_lr ({learner.min_lr:g}) is larger than learner.lr ({learner.lr:g})"
    if learner.lr_schedule == "constant":
        if learner.min_lr:
            yield "learner.min_lr is the end of a decay: set learner.lr_schedule to one that falls"
    elif learner.warmup_steps + max(decay_steps(learner), 1) > learner.steps:
        yield (
            f"learner.lr_schedule `{learner.lr_schedule}`: {learner.warmup_steps} steps of warm-up and "
            f"{max(decay_steps(learner), 1)} of decay do not fit into learner.steps ({learner.steps})"
        )
    if learner.decay_steps is not None and learner.lr_schedule != "warmup_stable_decay":
        yield (
            "learner.decay_steps is for learner.lr_schedule `warmup_stable_decay`; "
            f"`{learner.lr_schedule}` has no such part"
        )


def sync_rules(
    sync: SyncConfig, learner: LearnerConfig, rollout: RolloutConfig, teachers: Mapping[str, TeacherConfig]
) -> Iterator[str]:
    if sync.expert_mismatch and not rollout.gpus_per_worker:
        yield "sync.expert_mismatch: vLLM records experts on GPUs only: set rollout.gpus_per_worker"
    if sync.expert_mismatch and learner.deterministic:
        yield "sync.expert_mismatch needs the prefix cache, which learner.deterministic turns off: set one of the two"
    if sync.backend == "nccl":
        for key, gpus in member_gpus(learner, rollout, teachers.values()).items():
            if gpus < 1:
                yield (
                    f"sync.backend `nccl` sends between GPUs that no two processes share: {key} ({gpus:g}) must be 1 "
                    "or more, or set sync.backend to `gloo`"
                )
    if sync.backend == "ipc":
        members = member_gpus(learner, rollout, teachers.values())
        together = parts_of_one_gpu(reserved_gpus(learner, rollout, teachers))
        if not all(map(is_part, members.values())) or not together or rollout.max_workers is not None:
            parts = ", ".join(f"{key} ({gpus:g})" for key, gpus in members.items())
            yield (
                f"sync.backend `ipc` is for processes that share one GPU: {parts} must each be below 1, the parts of "
                "all processes at most 1 together, and rollout.max_workers unset; or set sync.backend to `gloo`"
            )


def gpu_rules(learner: LearnerConfig, rollout: RolloutConfig, teachers: Mapping[str, TeacherConfig]) -> Iterator[str]:
    if is_part(learner.gpus_per_rank) and learner.ranks > 1:
        yield (
            f"learner.gpus_per_rank is {learner.gpus_per_rank:g} for {learner.ranks} ranks: two ranks cannot share a "
            "GPU (nccl refuses it), so a part of a GPU needs learner.ranks 1"
        )
    if rollout.tensor_parallel_size > 1 and rollout.gpus_per_worker % 1:
        yield (
            f"rollout.tensor_parallel_size {rollout.tensor_parallel_size} needs whole GPUs, rollout.gpus_per_worker is "
            f"{rollout.gpus_per_worker:g}"
        )
    engines = {"rollout.gpu_memory_utilization": (rollout.gpu_memory_utilization, rollout.gpus_per_worker)}
    for name, one in teachers.items():
        section = "teacher" if name == "default" else f"teachers.{name}"
        engines[f"{section}.gpu_memory_utilization"] = (one.gpu_memory_utilization, one.gpus)
    for key, (utilization, gpus) in engines.items():
        if utilization is not None and is_part(gpus) and utilization > gpus:
            yield f"{key} ({utilization:g}) is more than the process's part of the GPU ({gpus:g})"


def context_rules(context: ContextConfig, data: DataConfig, rollout: RolloutConfig) -> Iterator[str]:
    if context.from_rollout is not None and rollout.teacher_answers:
        yield "context.from_rollout makes contexts of the student's answers: no rollout.source `teacher` or rollout.mix"
    keys = [f"data.columns.{name}" for name in ("context", "teacher_messages") if name in data.columns]
    keys += ["data.teacher_template"] if data.teacher_template is not None else []
    if keys and not context.from_rows:
        yield f"{keys[0]} gives each row its own context: set context.from_rows=true, or remove the key"
    if data.teacher_template is not None and "data.columns.teacher_messages" in keys:
        yield "data.teacher_template makes the teacher's messages: remove data.columns.teacher_messages"


def evaluation_rules(settings: EvalConfig, data: DataConfig) -> Iterator[str]:
    if settings.every and data.valid is None:
        yield (
            f"eval.every is {settings.every} and data.valid is not set: evaluation during training needs rows apart "
            "from data.eval: set data.valid, or eval.every=0"
        )
    if settings.temperature == 0 and (settings.samples > 1 or settings.top_p != 1 or settings.top_k):
        yield (
            f"eval.temperature 0 is greedy, all answers to a row are equal: eval.samples ({settings.samples}), "
            f"eval.top_p ({settings.top_p}) and eval.top_k ({settings.top_k}) need a temperature above 0"
        )


def teacher_rules(
    teachers: Mapping[str, TeacherConfig], student: StudentConfig, loss: LossConfig, learner: LearnerConfig
) -> Iterator[str]:
    """Check all teachers; the `teacher` section is ``default``."""
    for name, teacher in teachers.items():
        section = "teacher" if name == "default" else f"teachers.{name}"
        if loss.top_k > teacher.max_k:
            yield f"loss.top_k {loss.top_k} is larger than {section}.max_k {teacher.max_k}"
        is_student = teacher.url is None and teacher.model in (None, student.model)
        if teacher.kind != "frozen" and not is_student:
            yield (
                f"{section}.kind `{teacher.kind}` is the student's own weights, private to this run: "
                f"{section}.url and another {section}.model are not possible"
            )
        if teacher.backend == "vllm" and teacher.url is None and not teacher.gpus and loss.support != "teacher":
            yield (
                f"{section}.backend `vllm` on CPU returns log-probs at its own top k only, loss.support is "
                f"`{loss.support}`: set loss.support to `teacher`, {section}.backend to `transformers`, or "
                f"{section}.gpus"
            )
        if teacher.backend == "remote" and teacher.url is None:
            yield from _remote_rules(section, loss, learner)
        if name != "default" and teacher.kind == "base":
            yield f"{section}.kind `base` is possible for `teacher` only, as the run's single teacher"
    if teachers["default"].kind != "base":
        return
    if learner.lora is None:
        yield "teacher.kind `base` is the student without its adapters: it needs learner.lora"
    if len(teachers) > 1:
        yield "teacher.kind `base`: the learner scores every row, so `teachers` must be empty"
    if loss.support != "student":
        yield "teacher.kind `base` scores the student's ids: loss.support must be `student`"


def _remote_rules(section: str, loss: LossConfig, learner: LearnerConfig) -> Iterator[str]:
    other = "or choose another backend"
    if loss.temperature != 1:
        yield (
            f"{section}.backend `remote` gets log-probs at temperature 1 only, loss.temperature is "
            f"{loss.temperature:g}: set it to 1, {other}"
        )
    if learner.deterministic:
        yield (
            f"{section}.backend `remote`: the endpoint's scores depend on its other requests in the last digits, so "
            f"learner.deterministic is not possible: turn it off, {other}"
        )


def worker_rules(rollout: RolloutConfig) -> Iterator[str]:
    if rollout.max_workers is not None and rollout.max_workers < rollout.workers:
        yield (
            f"rollout.max_workers ({rollout.max_workers}) is less than rollout.workers ({rollout.workers}), the "
            "number that the run starts with"
        )
