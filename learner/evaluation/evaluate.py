"""Answers on held-out rows, greedy or several a row, graded and written down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Protocol

from common.config.model import Config
from common.data.rendering import teacher_sequence
from common.evaluation.accuracy import Accuracy, pass_at_1
from common.protocol.schema import Prompt, Sampling
from common.telemetry.run_files import RunFiles
from learner.data.inputs import Inputs
from learner.data.samples import sample_seed

Asked = list[tuple[Prompt, int]]
"""(row, number of the answer) of every answer that is wanted."""


class Answers(Protocol):
    """What an evaluation needs of the services (`learner.cluster.services.Services`)."""

    async def generate(self, asked: Sequence[tuple[Sequence[int], Sampling]]) -> list[Any]:
        """Answers to token prompts."""
        ...

    async def play(self, asked: Sequence[tuple[Prompt, Sampling]], *, in_context: bool) -> list[Any]:
        """Games, played."""
        ...


async def evaluate_rows(
    services: Answers,
    config: Config,
    inputs: Inputs,
    rows: Sequence[Prompt],
    name: str,
    step: int,
    files: RunFiles,
    with_context: bool,
) -> Accuracy:
    """``eval.samples`` answers to each row, graded, each written down; games are played, and right where they were won.

    Every answer has a seed of its own, a function of the run's seed, the row and its number: the same before and after
    training, whatever the number of workers.
    """
    asked = [(row, number) for row in rows for number in range(config.eval.samples)]
    prompts = [one for one in asked if one[0].game is None]
    games = [one for one in asked if one[0].game is not None]
    labels = {"set": name, "step": step}
    verdicts: dict[str, list[bool]] = {row.row_id: [] for row in rows}
    if prompts:
        for (row, _), right in zip(
            prompts, await _answer(services, config, inputs, prompts, labels, files, with_context), strict=True
        ):
            verdicts[row.row_id].append(right)
    if games:
        played = await _play(services, config, games, labels, files, with_context)
        for (row, _), right in zip(games, played, strict=True):
            verdicts[row.row_id].append(right)
    return pass_at_1(verdicts)


def eval_sampling(config: Config, row_id: str, number: int) -> Sampling:
    """How answer `number` to a row is made: greedy, or drawn as ``eval`` says."""
    settings = config.eval
    return Sampling(
        max_tokens=settings.max_tokens or config.rollout.max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        draw_from=settings.top_k,
        stop=config.rollout.stop,
        seed=sample_seed("eval", config.run.seed, f"{row_id}/{number}") if settings.temperature else None,
    )


def context_named(row: Prompt) -> dict[str, str]:
    """Which of a pool's contexts goes with the row; nothing where there is no pool."""
    return {} if row.context_id is None else {"context_id": row.context_id}


async def _answer(
    services: Answers,
    config: Config,
    inputs: Inputs,
    asked: Asked,
    labels: dict[str, Any],
    files: RunFiles,
    with_context: bool,
) -> list[bool]:
    sequences = [
        teacher_sequence(row, inputs.contexts) if with_context else row.student_ids.tolist() for row, _ in asked
    ]
    samplings = [eval_sampling(config, row.row_id, number) for row, number in asked]
    answers = await services.generate(list(zip(sequences, samplings, strict=True)))
    verdicts = []
    for (row, number), answer in zip(asked, answers, strict=True):
        verdicts.append(inputs.grader(answer.text, str(row.answer)))
        files.sample(
            {
                **labels,
                "id": row.row_id,
                **context_named(row),
                "sample": number,
                "answer": answer.text,
                "expected": row.answer,
                "right": verdicts[-1],
                "finish_reason": answer.finish_reason,
            }
        )
    return verdicts


async def _play(
    services: Answers, config: Config, asked: Asked, labels: dict[str, Any], files: RunFiles, with_context: bool
) -> list[bool]:
    games = [(row, eval_sampling(config, row.row_id, number)) for row, number in asked]
    episodes = await services.play(games, in_context=with_context)
    for (row, number), episode in zip(asked, episodes, strict=True):
        files.sample(
            {
                **labels,
                "id": row.row_id,
                **context_named(row),
                "sample": number,
                "exchanges": [asdict(exchange) for exchange in episode.exchanges],
                "outcome": episode.outcome,
                "reward": episode.reward,
                "right": episode.success,
            }
        )
    return [episode.success for episode in episodes]
