"""Off-policy training: answers of the teacher with the context, sampled once into a file, then trained on.

::

    collect ──► rollout pool with the teacher's weights, prompts with the context ──► offpolicy.jsonl
                                                                                          │
    pipeline ◄── trajectories: student's prompt (no context) and stored answer, once each ◄┘

The file is JSON lines: a header with the answers' origin, then one answer a line, in order of completion.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from common.config.model import Config
from common.protocol.schema import FinishReason, Sample, Trajectory, as_ids
from learner.data.inputs import Inputs
from learner.data.samples import SampleSource
from learner.errors import RunError

FORMAT = 1


class GeneratedAnswer(Protocol):
    """An engine's answer: token ids, stop included, and finish reason (see `rollout_workers.actor`)."""

    @property
    def ids(self) -> list[int]: ...

    @property
    def finish_reason(self) -> FinishReason: ...


class AnswerFile:
    """Stored answers by sample number. Memory holds their offsets in the file, not the answers."""

    def __init__(self, path: Path, origin: dict[str, Any]) -> None:
        """Open or create `path`. A last line that a crash cut short is dropped.

        Raises RunError for a file of another `origin` (JSON values) or another format.
        """
        self.path = path
        self._offsets: dict[int, int] = {}
        header = {"format": FORMAT, **origin}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size:
            self._read(header)
        self._stream = path.open("r+b") if path.exists() else path.open("w+b")
        self._stream.seek(0, 2)
        if not self._stream.tell():
            self._write(header)

    def __contains__(self, number: int) -> bool:
        return number in self._offsets

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """One answer: ``number``, ``sample_id``, ``response_ids``, ``finish_reason``."""
        self._stream.seek(self._offsets[number])
        return cast(dict[str, Any], json.loads(self._stream.readline()))

    def add(self, sample: Sample, answer: GeneratedAnswer) -> None:
        """Append the answer to `sample` and flush. Raises RunError for a second answer."""
        if sample.number in self._offsets:
            raise RunError(f"{self.path}: sample {sample.number} already has an answer")
        self._stream.seek(0, 2)
        self._offsets[sample.number] = self._stream.tell()
        self._write(
            {
                "number": sample.number,
                "sample_id": sample.sample_id,
                "response_ids": list(answer.ids),
                "finish_reason": answer.finish_reason,
            }
        )

    def close(self) -> None:
        """Close the file; it can be opened and extended again."""
        self._stream.close()

    def _write(self, line: dict[str, Any]) -> None:
        self._stream.write(json.dumps(line).encode() + b"\n")
        self._stream.flush()

    def _read(self, header: dict[str, Any]) -> None:
        offset = 0
        with self.path.open("rb+") as stream:
            for number, line in enumerate(stream):
                if not line.endswith(b"\n"):
                    break
                try:
                    found = json.loads(line)
                    if number:
                        self._offsets[found["number"]] = offset
                except (json.JSONDecodeError, KeyError, TypeError) as error:
                    raise RunError(f"{self.path}:{number + 1} is not a stored answer: {error}") from error
                if not number:
                    self._refuse_other(found, header)
                offset += len(line)
            stream.truncate(offset)

    def _refuse_other(self, found: Any, header: dict[str, Any]) -> None:
        if not isinstance(found, dict) or "format" not in found:
            raise RunError(f"{self.path} holds no stored answers: choose another rollout.answers_file")
        different = [
            f"{name} is {found.get(name)}, here {header.get(name)}"
            for name in sorted({*found, *header})
            if found.get(name) != header.get(name)
        ]
        if different:
            raise RunError(
                f"{self.path} holds answers of another origin: {'; '.join(different)}. Remove it, or choose another "
                "rollout.answers_file"
            )


def answers_origin(config: Config, *, contexts: Sequence[str], data: str) -> dict[str, Any]:
    """Everything that determines the answers, as JSON values; `contexts` are hashes, `data` is the rows' sha256.

    For a model folder this includes sizes and times of its files, so a retrained model has another origin.
    """
    rollout = config.rollout
    sampling = {"max_tokens", "temperature", "top_p", "stop", "batch_size", "samples_per_prompt"}
    folder = Path(config.teacher_model)
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    return {
        "model": config.teacher_model,
        "files": {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files},
        "contexts": hashlib.sha256("".join(sorted(contexts)).encode()).hexdigest(),
        "data": data,
        "seed": config.run.seed,
        **rollout.model_dump(mode="json", include=sampling),
    }


class TeacherAnswers:
    """The stored answers of one run: collects missing ones and returns each as a trajectory."""

    def __init__(self, config: Config, source: SampleSource, file: AnswerFile) -> None:
        self._source = source
        self._file = file
        self._count = config.learner.steps * source.per_step

    def missing(self) -> list[Sample]:
        """The teacher's samples of all steps that have no answer yet."""
        samples = (self._source[number] for number in range(self._count) if number not in self._file)
        return [sample for sample in samples if sample.from_teacher]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    async def collect(
        self,
        prompt_of: Callable[[Sample], list[int]],
        generate: Callable[[Sample, Sequence[int]], Coroutine[Any, Any, GeneratedAnswer]],
        status: Callable[[str], None],
    ) -> None:
        """Generate every missing answer: `prompt_of` returns prompt tokens with the context, `generate` the answer.

        Raises the first failure; answers before it stay in the file.
        """

        async def answer(sample: Sample) -> None:
            without_ids = replace(sample, sampling=replace(sample.sampling, top_logprobs=0))
            self._file.add(sample, await generate(without_ids, prompt_of(sample)))
            status(f"the teacher answers: {len(self._file)}/{total}")

        missing = self.missing()
        total = len(self._file) + len(missing)
        try:
            async with asyncio.TaskGroup() as group:
                for sample in missing:
                    group.create_task(answer(sample))
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None

    def trajectory(self, sample: Sample, version: int) -> Trajectory:
        """The student's prompt with the stored answer, for training at weights `version`.

        Sampled log-probs are NaN: the teacher sampled the answer, and no loss that off-policy training allows needs
        them. Raises RunError if the stored answer belongs to another sample.
        """
        found = self._file[sample.number]
        if found["sample_id"] != sample.sample_id:
            raise RunError(
                f"{self._file.path}: answer {sample.number} belongs to {found['sample_id']!r}, not {sample.sample_id!r}"
            )
        ids = as_ids(found["response_ids"])
        return Trajectory(
            sample_id=sample.sample_id,
            step=sample.step,
            prompt=sample.prompt,
            response_ids=ids,
            sampled_logprobs=np.full(len(ids), np.nan, dtype=np.float32),
            topk_ids=as_ids(np.empty((len(ids), 0))),
            finish_reason=found["finish_reason"],
            versions=((0, version),),
            from_teacher=True,
        )


def open_teacher_answers(config: Config, inputs: Inputs) -> TeacherAnswers | None:
    """The stored answers of the run; None if it trains on the student's own. Raises RunError as `AnswerFile`."""
    if not config.rollout.teacher_answers:
        return None
    origin = answers_origin(config, contexts=inputs.context_names, data=inputs.data_digest)
    source = SampleSource(config, inputs.train, inputs.context_sampler, inputs.set_sizes)
    return TeacherAnswers(config, source, AnswerFile(config.answers_path, origin))


@dataclass(frozen=True, slots=True)
class Replayed:
    """Summary of a stored answer, in place of a worker's `RolloutSummary`."""

    prompt_tokens: int
    response_tokens: int
    student_tokens: int
    finish_reason: FinishReason
    versions: tuple[tuple[int, int], ...]
    episode: None = None
    context: None = None

    @classmethod
    def of(cls, trajectory: Trajectory) -> Replayed:
        """Summary of `trajectory`."""
        return cls(
            len(trajectory.prompt.student_ids),
            len(trajectory.response_ids),
            len(trajectory.response_ids),
            trajectory.finish_reason,
            trajectory.versions,
        )
