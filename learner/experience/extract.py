"""The first stage of `opcd experience`: problems are solved, and insights written down, over rollout workers.

Each stage reads a file of the one before it and writes one, under ``runs/NAME/experience/``; one that was cut off goes
on where it was. The other stages are in `learner.experience.pool`.

::

    data.train ──► solved.jsonl ──► extracted.jsonl ──► pool.jsonl ──► selected.jsonl ──► a run with context.pool
           extract (two files)              accumulate        select            consolidate
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.config.model import Config, ConfigError, ContextConfig
from common.data.rendering import Renderer, load_tokenizer
from common.data.rows import Message, Row, read_rows
from common.protocol.schema import Prompt, Sampling
from common.telemetry.run_files import Progress
from learner.data.games import environment_error
from learner.data.inputs import Inputs, read_inputs
from learner.data.samples import sample_seed
from learner.evaluation.evaluate import Answers
from learner.experience.parse import items_of
from learner.experience.stage_file import StageFile
from learner.experience.templates import Templates, load_templates
from learner.experience.traces import answer_trace, game_trace, problem_of

SOLVED, EXTRACTED = "solved.jsonl", "extracted.jsonl"

NOTHING = "-"
"""A context for where nobody sees one: solving and extracting are done without."""


def folder(config: Config) -> Path:
    """Where the stages leave their files."""
    return config.run.path / "experience"


def solver(config: Config) -> str:
    """The model that solves and writes."""
    return config.experience.model or config.student.model


def without_context(config: Config) -> Config:
    """The same before there is any experience."""
    return config.model_copy(update={"context": ContextConfig(text=NOTHING, placement=config.context.placement)})


# --- extract ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """Number `place` of series `seed`: a row of ``data.train``, and as the student sees it."""

    seed: int
    place: int
    row: Row
    prompt: Prompt

    @property
    def key(self) -> tuple[int, int]:
        """Its name in the files."""
        return self.seed, self.place

    def line(self) -> dict[str, Any]:
        """What every line about it begins with."""
        return {"seed": self.seed, "place": self.place, "id": self.row.id}


def problems_of(config: Config, rows: Sequence[Row], prompts: Sequence[Prompt]) -> list[Problem]:
    """All problems, series by series, each series an order of its own (a function of the run's seed).

    Raises ConfigError where there are fewer rows than a series takes.
    """
    settings = config.experience
    if settings.problems > len(rows):
        raise ConfigError(f"experience.problems is {settings.problems}, data.train has {len(rows)} rows")
    found: list[Problem] = []
    for seed in range(settings.seeds):
        order = np.random.default_rng([config.run.seed, seed]).permutation(len(rows))[: settings.problems]
        found += [Problem(seed, place, rows[index], prompts[index]) for place, index in enumerate(order)]
    return found


class Extraction:
    """Solves problems and has the solver look back at each, in groups of ``rollout.batch_size``."""

    def __init__(self, config: Config, templates: Templates, inputs: Inputs, rows: Sequence[Row]) -> None:
        """`inputs` and `rows` are of ``data.train``. Raises ConfigError for files that were made otherwise."""
        self._config = config
        self._templates = templates
        self._problems = problems_of(config, rows, inputs.train)
        self._limit = inputs.student_limit
        self._renderer = Renderer(load_tokenizer(config.student.model), NOTHING, config.student)
        made_of = _made_of(config, inputs)
        self._solved = StageFile(folder(config) / SOLVED, made_of)
        self._extracted = StageFile(folder(config) / EXTRACTED, {**made_of, "templates": templates.digest})

    @property
    def done(self) -> bool:
        """Whether nothing is missing."""
        return not self._missing(self._extracted)

    async def run(self, services: Answers, progress: Progress) -> None:
        """Do what is missing."""
        await self._solve(services, progress)
        await self._extract(services, progress)

    def summary(self) -> str:
        """What came of it, in a line."""
        lines = self._extracted.rows
        items, refused = sum(len(line["items"]) for line in lines), sum("fault" in line for line in lines)
        empty = sum(not line["items"] for line in lines) - refused
        return f"{items} items from {len(lines)} problems ({empty} gave none, {refused} were too long)"

    def close(self) -> None:
        """Let go of the files."""
        self._solved.close()
        self._extracted.close()

    async def _solve(self, services: Answers, progress: Progress) -> None:
        missing = self._missing(self._solved)
        for done, group in enumerate(_groups(missing, self._config.rollout.batch_size)):
            progress.status(f"solving: {done * self._config.rollout.batch_size} of {len(missing)} problems")
            samplings = [self._sampling("solve", problem) for problem in group]
            pairs = list(zip(group, samplings, strict=True))
            games = [(one.prompt, sampling) for one, sampling in pairs if one.prompt.game is not None]
            texts = [(one.prompt.student_ids.tolist(), sampling) for one, sampling in pairs if one.prompt.game is None]
            played = iter(await services.play(games, in_context=False) if games else ())
            answered = iter(await services.generate(texts) if texts else ())
            self._solved.add(_solved(one, next(answered if one.prompt.game is None else played)) for one in group)

    async def _extract(self, services: Answers, progress: Progress) -> None:
        solved = {(line["seed"], line["place"]): line for line in self._solved.rows}
        missing = self._missing(self._extracted)
        for done, group in enumerate(_groups(missing, self._config.rollout.batch_size)):
            progress.status(f"extracting: {done * self._config.rollout.batch_size} of {len(missing)} problems")
            asked, lines = [], []
            for problem in group:
                sampling = self._sampling("extract", problem)
                ids = self._question(problem, solved[problem.key])
                if len(ids) + sampling.max_tokens > self._limit:
                    fault = (
                        f"{len(ids)} tokens to look back at and {sampling.max_tokens} of answer, at most {self._limit}"
                    )
                    lines.append({**problem.line(), "items": [], "fault": fault})
                else:
                    asked.append((problem, ids, sampling))
            answers = await services.generate([(ids, sampling) for _, ids, sampling in asked]) if asked else []
            for (problem, _, _), answer in zip(asked, answers, strict=True):
                told = {"items": list(items_of(answer.text)), "answer": answer.text}
                lines.append({**problem.line(), **told, "finish_reason": answer.finish_reason})
            self._extracted.add(lines)

    def _missing(self, file: StageFile) -> list[Problem]:
        done = {(line["seed"], line["place"]) for line in file.rows}
        return [problem for problem in self._problems if problem.key not in done]

    def _question(self, problem: Problem, solved: dict[str, Any]) -> list[int]:
        """What the solver is asked about its own attempt: raw where the row is, else a chat."""
        game = problem.prompt.game is not None
        text = self._templates.extraction(solved["problem"], solved["trace"], game=game)
        row = (
            Row(id=problem.row.id, messages=(Message(role="user", content=text),))
            if problem.row.prompt is None
            else Row(id=problem.row.id, prompt=text + "\n")
        )
        return self._renderer.render(row).student_ids.tolist()

    def _sampling(self, what: str, problem: Problem) -> Sampling:
        rollout, name = self._config.rollout, f"{problem.seed}/{problem.place}/{problem.row.id}"
        solving = what == "solve"
        return Sampling(
            max_tokens=rollout.max_tokens if solving else self._config.experience.max_tokens or rollout.max_tokens,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            stop=rollout.stop if solving else (),  # a list has many lines
            seed=sample_seed(f"experience/{what}", self._config.run.seed, name),
        )


def _solved(problem: Problem, done: Any) -> dict[str, Any]:
    """What is kept of an answer, or of a game. No ground truth: the expected answer and the reward are left out."""
    if problem.prompt.game is None:
        seen = {"problem": problem_of(problem.row), "trace": answer_trace(done.text)}
        return {**problem.line(), **seen, "finish_reason": done.finish_reason}
    board = done.exchanges[0].observation
    return {**problem.line(), "problem": board, "trace": game_trace(done.exchanges, done.outcome)}


def _made_of(config: Config, inputs: Inputs) -> dict[str, Any]:
    sampling = {"max_tokens", "temperature", "top_p", "stop"}
    return {
        "model": solver(config),
        "student": config.student.model_dump(mode="json", exclude={"model", "dtype"}),
        "data": inputs.data_digest,
        "seed": config.run.seed,
        "rollout": config.rollout.model_dump(mode="json", include=sampling),
        "extract_tokens": config.experience.max_tokens,
    }


def _groups(problems: Sequence[Problem], size: int) -> list[Sequence[Problem]]:
    return [problems[start : start + size] for start in range(0, len(problems), size)]


def extraction_of(config: Config) -> Extraction:
    """What `extract` does, everything read and checked. Raises ConfigError and DataError."""
    plain = without_context(config)
    rows = read_rows(config.data.train, config.data, check=environment_error)
    return Extraction(config, load_templates(config.experience.templates), read_inputs(plain), rows)
