"""Summary of a run that would start: rows, lengths, processes, work, output folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from common.config.model import Config
from common.protocol.schema import Prompt
from learner.data.inputs import Inputs, Sources
from learner.preflight.report import Finding, summary


def count_rows(sources: Sources) -> Finding:
    """The number of rows of each set."""
    named = {"train": sources.train, "valid": sources.valid, "eval": sources.eval}
    named |= {f"eval.ood.{name}": rows for name, rows in sources.ood.items()}
    return summary("rows", ", ".join(f"{len(rows)} {name}" for name, rows in named.items() if rows))


def unused_columns(sources: Sources) -> Iterator[Finding]:
    """Yield the columns that no row uses, once for all sets."""
    names = dict.fromkeys(name for columns in sources.unused.values() for name in columns)
    if names:
        yield summary("not used", f"columns {', '.join(names)}")


def summarize(config: Config, inputs: Inputs) -> Iterator[Finding]:
    """Yield the facts of a run in a few lines."""
    rollout, learner = config.rollout, config.learner
    student = [row.student_tokens for rows in inputs.facts.values() for row in rows]
    teacher = [row.teacher_tokens for row in inputs.facts["data.train"]]
    seen = "before the context of the answer" if config.context.from_rollout else "with the context"
    yield summary("prompts", f"student {_range(student)} tokens, teacher {_range(teacher)} tokens {seen}")
    contexts = [len(context.ids) for context in inputs.contexts.values()]
    if config.context.by_row:
        own = [row.own_tokens for row in inputs.facts["data.train"] if row.own_tokens is not None]
        kind = f"of the rows, {_range(own)} tokens" if config.context.from_rows else "of the answers"
        shared = f"; {len(contexts)} shared, {_range(contexts)} tokens" if contexts else ""
        yield summary("contexts", kind + shared)
    else:
        yield summary("contexts", f"{len(contexts)}, {_range(contexts)} tokens")
    yield summary(
        "answers",
        f"at most {rollout.max_tokens} tokens; prompt and answer fit {inputs.student_limit} tokens of the student",
    )
    yield summary("runs", ", ".join(_processes(config)))
    samples = rollout.batch_size * rollout.samples_per_prompt
    epochs = learner.steps * rollout.batch_size / len(inputs.train)
    yield summary(
        "work",
        f"{learner.steps} steps of {samples} answers, {epochs:.1f} passes over the rows, at most "
        f"{learner.steps * samples * rollout.max_tokens:,} sampled tokens",
    )
    yield summary("graded", _graded(config, inputs))
    yield summary("folder", str(config.run.path))


def _range(values: Sequence[int]) -> str:
    if not values:
        return "0"
    return f"{min(values)}" if min(values) == max(values) else f"{min(values)} to {max(values)}"


def _processes(config: Config) -> Iterator[str]:
    rollout, learner = config.rollout, config.learner
    yield _count(rollout.workers, "rollout worker", rollout.gpus_per_worker * rollout.tensor_parallel_size)
    yield _count(learner.ranks, "learner rank", learner.gpus_per_rank)
    for name, teacher in config.named_teachers().items():
        label = "teacher" if name == "default" else f"teacher {name}"
        if teacher.url is not None:
            yield f"{label} at {teacher.url}"
        elif teacher.kind == "base":
            yield f"{label} in the learner"
        else:
            yield _count(1, label, teacher.gpus)


def _count(number: int, name: str, gpus: float) -> str:
    return f"{number} {name}{'s' * (number > 1)} on {f'{gpus:g} GPU' if gpus else 'CPU'}"


def _graded(config: Config, inputs: Inputs) -> str:
    def answers(rows: Sequence[Prompt]) -> int:
        return len(rows) * config.eval.samples

    held_out = sum(answers(rows) for rows in (inputs.eval, *inputs.ood.values()))
    when = f"{held_out} answers before and after training"
    if config.eval.every:
        return f"{when}, {answers(inputs.valid)} every {config.eval.every} steps"
    return when
