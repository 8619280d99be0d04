"""The first stage of `opcd experience`: the solver answers problems, then writes insights from each of its attempts.

::

    data.train ──► solved.jsonl ──► extracted.jsonl ──► pool.jsonl ──► selected.jsonl ──► a run with context.pool
           extract (two files)              accumulate        select            consolidate
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.config.model import Config, ConfigError, ContextConfig, ExperienceConfig
from common.data.model_lookup import load_tokenizer
from common.data.rendering import Renderer
from common.data.rows import Message, Row, read_rows
from common.protocol.schema import Prompt, Sampling
from common.telemetry.run_files import Progress
from learner.cluster.services import Services
from learner.data.games import environment_error
from learner.data.inputs import Inputs, read_inputs
from learner.data.samples import sample_seed
from learner.experience.prompts import Templates, answer_trace, game_trace, load_templates, parse_items, problem_text
from learner.experience.stage_files import EXTRACTED, SOLVED, StageFile, experience_folder

PLACEHOLDER_CONTEXT = "-"
"""Stands for the context, which solving and extracting do not use."""


def solver(config: Config) -> str:
    """Return the model that solves problems and writes insights."""
    return config.experience.model or config.student.model


def without_context(config: Config) -> Config:
    """Return the configuration with a placeholder for the context, which does not exist yet."""
    context = ContextConfig(text=PLACEHOLDER_CONTEXT, placement=config.context.placement)
    return config.model_copy(update={"context": context})


@dataclass(frozen=True)
class Problem:
    """Problem number `position` of series `seed`: a row of ``data.train``, and its prompt for the student."""

    seed: int
    position: int
    row: Row
    prompt: Prompt

    @property
    def key(self) -> tuple[int, int]:
        """Identity of the problem in the stage files."""
        return self.seed, self.position

    def line(self) -> dict[str, Any]:
        """Return the first fields of every line about the problem."""
        return {"seed": self.seed, "position": self.position, "id": self.row.id}


def choose_problems(
    experience: ExperienceConfig, run_seed: int, rows: Sequence[Row], prompts: Sequence[Prompt]
) -> list[Problem]:
    """Return the problems of all series; each series has a random order, a function of `run_seed`.

    Raises ConfigError if a series needs more problems than there are rows.
    """
    if experience.problems > len(rows):
        raise ConfigError(f"experience.problems is {experience.problems}, data.train has {len(rows)} rows")
    problems: list[Problem] = []
    for seed in range(experience.seeds):
        order = np.random.default_rng([run_seed, seed]).permutation(len(rows))[: experience.problems]
        problems += [Problem(seed, position, rows[index], prompts[index]) for position, index in enumerate(order)]
    return problems


class Extraction:
    """Solves problems and extracts insights from the attempts, in groups of ``rollout.batch_size``."""

    def __init__(self, config: Config, templates: Templates, inputs: Inputs, rows: Sequence[Row]) -> None:
        """`rows` are those of ``data.train``. Raises ConfigError if other inputs made the stage's files."""
        self._config = config
        self._templates = templates
        self._problems = choose_problems(config.experience, config.run.seed, rows, inputs.train)
        self._max_sequence_tokens = inputs.student_limit
        self._renderer = Renderer(load_tokenizer(config.student.model), PLACEHOLDER_CONTEXT, config.student)
        file_inputs, folder = _file_inputs(config, inputs), experience_folder(config.run)
        self._solved = StageFile(folder / SOLVED, file_inputs)
        self._extracted = StageFile(folder / EXTRACTED, {**file_inputs, "templates": templates.digest})

    @property
    def done(self) -> bool:
        """True when no problem is missing."""
        return not self._missing(self._extracted)

    async def run(self, services: Services, progress: Progress) -> None:
        """Solve the missing problems, then extract the missing insights."""
        await self._solve(services, progress)
        await self._extract(services, progress)

    def summary(self) -> str:
        """Return one line with the numbers of items, problems, and problems without items."""
        lines = self._extracted.rows
        items, too_long = sum(len(line["items"]) for line in lines), sum("fault" in line for line in lines)
        empty = sum(not line["items"] for line in lines) - too_long
        return f"{items} items from {len(lines)} problems ({empty} gave none, {too_long} were too long)"

    def close(self) -> None:
        """Close the files."""
        self._solved.close()
        self._extracted.close()

    async def _solve(self, services: Services, progress: Progress) -> None:
        missing = self._missing(self._solved)
        for done, group in enumerate(_groups(missing, self._config.rollout.batch_size)):
            progress.status(f"solving: {done * self._config.rollout.batch_size} of {len(missing)} problems")
            requests = [(problem, self._sampling("solve", problem)) for problem in group]
            games = [(one.prompt, sampling) for one, sampling in requests if one.prompt.game is not None]
            texts = [(one.prompt.student_ids.tolist(), s) for one, s in requests if one.prompt.game is None]
            played = iter(await services.play(games, in_context=False) if games else ())
            answered = iter(await services.generate(texts) if texts else ())
            self._solved.add(_solved_line(one, next(answered if one.prompt.game is None else played)) for one in group)

    async def _extract(self, services: Services, progress: Progress) -> None:
        solved = {(line["seed"], line["position"]): line for line in self._solved.rows}
        missing = self._missing(self._extracted)
        for done, group in enumerate(_groups(missing, self._config.rollout.batch_size)):
            progress.status(f"extracting: {done * self._config.rollout.batch_size} of {len(missing)} problems")
            requests, lines = [], []
            for problem in group:
                sampling = self._sampling("extract", problem)
                ids = self._extraction_prompt(problem, solved[problem.key])
                if len(ids) + sampling.max_tokens > self._max_sequence_tokens:
                    fault = (
                        f"the prompt has {len(ids)} tokens and the answer up to {sampling.max_tokens}, "
                        f"at most {self._max_sequence_tokens} fit"
                    )
                    lines.append({**problem.line(), "items": [], "fault": fault})
                else:
                    requests.append((problem, ids, sampling))
            answers = await services.generate([(ids, sampling) for _, ids, sampling in requests]) if requests else []
            for (problem, _, _), answer in zip(requests, answers, strict=True):
                result = {"items": list(parse_items(answer.text)), "answer": answer.text}
                lines.append({**problem.line(), **result, "finish_reason": answer.finish_reason})
            self._extracted.add(lines)

    def _missing(self, file: StageFile) -> list[Problem]:
        done = {(line["seed"], line["position"]) for line in file.rows}
        return [problem for problem in self._problems if problem.key not in done]

    def _extraction_prompt(self, problem: Problem, solved: dict[str, Any]) -> list[int]:
        """Render the prompt that asks for insights: raw text if the row is raw, else a chat."""
        game = problem.prompt.game is not None
        text = self._templates.extraction_prompt(solved["problem"], solved["trace"], game=game)
        row = (
            Row(id=problem.row.id, messages=(Message(role="user", content=text),))
            if problem.row.prompt is None
            else Row(id=problem.row.id, prompt=text + "\n")
        )
        return self._renderer.render(row).student_ids.tolist()

    def _sampling(self, stage: str, problem: Problem) -> Sampling:
        rollout, name = self._config.rollout, f"{problem.seed}/{problem.position}/{problem.row.id}"
        solving = stage == "solve"
        return Sampling(
            max_tokens=rollout.max_tokens if solving else self._config.experience.max_tokens or rollout.max_tokens,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            stop=rollout.stop if solving else (),  # a list of insights has several lines
            seed=sample_seed(f"experience/{stage}", self._config.run.seed, name),
        )


def _solved_line(problem: Problem, result: Any) -> dict[str, Any]:
    """Return the line of an answer or a game, without ground truth: no expected answer, no reward."""
    if problem.prompt.game is None:
        texts = {"problem": problem_text(problem.row), "trace": answer_trace(result.text)}
        return {**problem.line(), **texts, "finish_reason": result.finish_reason}
    board = result.exchanges[0].observation
    return {**problem.line(), "problem": board, "trace": game_trace(result.exchanges, result.outcome)}


def _file_inputs(config: Config, inputs: Inputs) -> dict[str, Any]:
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


def prepare_extraction(config: Config) -> Extraction:
    """Read and check all inputs of the extraction. Raises ConfigError and DataError."""
    rows = read_rows(config.data.train, config.data, check=environment_error)
    return Extraction(config, load_templates(config.experience.templates), read_inputs(without_context(config)), rows)
