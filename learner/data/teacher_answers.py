"""Answers that the teacher made with the context: sampled once into a file, then trained on like the student's own.

::

    collect ──► a rollout pool of the teacher's weights, prompts with the context ──► offpolicy.jsonl
                                                                                          │
    stream ◄── trajectories of the student's prompts (no context) and the stored answers ◄┘  each once, in its step

The file is plain JSON lines: a header that says what made it, then one answer a line, in the order in which they ended.
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


class Made(Protocol):
    """An answer of an engine (`rollout_workers.actor.Answer`)."""

    @property
    def ids(self) -> list[int]:
        """Its tokens, the stop included."""
        ...

    @property
    def finish_reason(self) -> FinishReason:
        """Why it ended."""
        ...


class AnswerFile:
    """Stored answers by the number of their sample. Close it; more can be added to one that was closed.

    Memory holds where each answer lies, not the answers.
    """

    def __init__(self, path: Path, made_by: dict[str, Any]) -> None:
        """Open `path`, or begin it. A last line that a crash cut short is dropped.

        Raises RunError for a file that something else than `made_by` (JSON values) made, or that is none of these.
        """
        self.path = path
        self._places: dict[int, int] = {}
        header = {"format": FORMAT, **made_by}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size:
            self._read(header)
        self._stream = path.open("r+b") if path.exists() else path.open("w+b")
        self._stream.seek(0, 2)
        if not self._stream.tell():
            self._write(header)

    def __contains__(self, number: int) -> bool:
        return number in self._places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """The line of one answer: ``number``, ``sample_id``, ``response_ids``, ``finish_reason``."""
        self._stream.seek(self._places[number])
        return cast(dict[str, Any], json.loads(self._stream.readline()))

    def add(self, sample: Sample, answer: Made) -> None:
        """Write down the answer to `sample`, at once. Raises RunError for a second one."""
        if sample.number in self._places:
            raise RunError(f"{self.path}: sample {sample.number} was answered already")
        self._stream.seek(0, 2)
        self._places[sample.number] = self._stream.tell()
        self._write(
            {
                "number": sample.number,
                "sample_id": sample.sample_id,
                "response_ids": list(answer.ids),
                "finish_reason": answer.finish_reason,
            }
        )

    def close(self) -> None:
        """Let go of the file."""
        self._stream.close()

    def _write(self, line: dict[str, Any]) -> None:
        self._stream.write(json.dumps(line).encode() + b"\n")
        self._stream.flush()

    def _read(self, header: dict[str, Any]) -> None:
        end = 0
        with self.path.open("rb+") as stream:
            for number, line in enumerate(stream):
                if not line.endswith(b"\n"):
                    break
                try:
                    found = json.loads(line)
                    if number:
                        self._places[found["number"]] = end
                except (json.JSONDecodeError, KeyError, TypeError) as error:
                    raise RunError(f"{self.path}:{number + 1} is no stored answer: {error}") from error
                if not number:
                    self._refuse_other(found, header)
                end += len(line)
            stream.truncate(end)

    def _refuse_other(self, found: Any, header: dict[str, Any]) -> None:
        if not isinstance(found, dict) or "format" not in found:
            raise RunError(f"{self.path} holds no stored answers: choose another rollout.answers_file")
        names = sorted({*found, *header})
        different = [
            f"{name} is {found.get(name)}, here {header.get(name)}"
            for name in names
            if found.get(name) != header.get(name)
        ]
        if different:
            raise RunError(
                f"{self.path} holds answers made by something else: {'; '.join(different)}. Remove it, or choose "
                "another rollout.answers_file"
            )


def made_by(config: Config, *, contexts: Sequence[str], data: str) -> dict[str, Any]:
    """What decides the answers, as JSON values; `contexts` are their hashes, `data` the sha256 of the training rows.

    Of a model that is a folder also its files, with sizes and times: one that was trained anew is another.
    """
    rollout = config.rollout
    asked = {"max_tokens", "temperature", "top_p", "stop", "batch_size", "samples_per_prompt"}
    folder = Path(config.teacher_model)
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    return {
        "model": config.teacher_model,
        "files": {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files},
        "contexts": hashlib.sha256("".join(sorted(contexts)).encode()).hexdigest(),
        "data": data,
        "seed": config.run.seed,
        **rollout.model_dump(mode="json", include=asked),
    }


class Offline:
    """The stored answers of one run: what is missing, how it is made, and each as a trajectory."""

    def __init__(self, config: Config, source: SampleSource, file: AnswerFile) -> None:
        self._source = source
        self._file = file
        self._count = config.learner.steps * source.per_step

    def missing(self) -> list[Sample]:
        """Samples of the run, to its last step, that have no answer yet."""
        return [self._source[number] for number in range(self._count) if number not in self._file]

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    async def collect(
        self,
        prompt_of: Callable[[Sample], list[int]],
        generate: Callable[[Sample, Sequence[int]], Coroutine[Any, Any, Made]],
        status: Callable[[str], None],
    ) -> None:
        """Have every missing answer made: `prompt_of` gives the tokens with the context, `generate` answers them.

        The first failure ends it and is raised; what was answered by then stays.
        """

        async def one(sample: Sample) -> None:
            asked = replace(sample, sampling=replace(sample.sampling, top_k=0))
            self._file.add(sample, await generate(asked, prompt_of(sample)))
            status(f"the teacher answers: {len(self._file)}/{self._count}")

        try:
            async with asyncio.TaskGroup() as group:
                for sample in self.missing():
                    group.create_task(one(sample))
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None

    def trajectory(self, sample: Sample, version: int) -> Trajectory:
        """The stored answer as one to the student's prompt, to be trained under weights `version`.

        Its log-probs under the engine that made it are unknown (NaN): they are of the teacher, and of no use to a loss
        that may be asked for here. Raises RunError for an answer that was made to another sample.
        """
        found = self._file[sample.number]
        if found["sample_id"] != sample.sample_id:
            raise RunError(
                f"{self._file.path}: answer {sample.number} is to {found['sample_id']!r}, not {sample.sample_id!r}"
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
        )


def open_offline(config: Config, inputs: Inputs) -> Offline | None:
    """The stored answers that a run is trained on; None where it is trained on the student's own.

    Raises RunError for a file that something else made.
    """
    if config.rollout.source == "student":
        return None
    origin = made_by(config, contexts=tuple(inputs.contexts), data=inputs.data_digest)
    source = SampleSource(config, inputs.train, inputs.draw)
    return Offline(config, source, AnswerFile(config.answers_path, origin))


@dataclass(frozen=True, slots=True)
class Replayed:
    """What the loop hears of a stored answer, as it hears of one that a worker made (`RolloutSummary`)."""

    prompt_tokens: int
    response_tokens: int
    student_tokens: int
    finish_reason: FinishReason
    versions: tuple[tuple[int, int], ...]
    episode: None = None

    @classmethod
    def of(cls, trajectory: Trajectory) -> Replayed:
        """Its sizes."""
        return cls(
            len(trajectory.prompt.student_ids),
            len(trajectory.response_ids),
            len(trajectory.response_ids),
            trajectory.finish_reason,
            trajectory.versions,
        )
