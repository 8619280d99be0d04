"""Generates, grades and stores answers to held-out rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from common.config.model import Config
from common.data.rendering import teacher_sequence
from common.evaluation.accuracy import Accuracy, pass_at_1
from common.protocol.schema import Prompt, Sampling
from common.telemetry.run_files import RunFiles
from learner.cluster.services import Services
from learner.data.inputs import Inputs
from learner.data.samples import sample_seed

Requested = list[tuple[Prompt, int]]
"""(row, answer number) of each answer to generate."""


async def evaluate_rows(
    services: Services,
    config: Config,
    inputs: Inputs,
    rows: Sequence[Prompt],
    name: str,
    step: int,
    files: RunFiles,
    with_context: bool,
    on_cut: Callable[[float], None] = lambda share: None,
) -> Accuracy:
    """Accuracy over ``eval.samples`` answers to each row; every answer goes to ``samples.jsonl``. A won game is right.

    `on_cut` is called with the share of answers that reached ``max_tokens``.
    Each answer's seed is a function of the run's seed, the row and the answer's number: equal before and after training
    for any number of workers.
    """
    requested = [(row, number) for row in rows for number in range(config.eval.samples)]
    prompts = [(row, number) for row, number in requested if row.game is None]
    games = [(row, number) for row, number in requested if row.game is not None]
    labels = {"set": name, "step": step}
    verdicts: dict[str, list[bool]] = {row.row_id: [] for row in rows}
    right: list[bool] = []
    if prompts:
        right += await _answer(services, config, inputs, prompts, labels, files, with_context, on_cut)
    if games:
        right += await _play(services, config, games, labels, files, with_context)
    for (row, _), verdict in zip([*prompts, *games], right, strict=True):
        verdicts[row.row_id].append(verdict)
    return pass_at_1(verdicts)


def eval_sampling(config: Config, row_id: str, number: int) -> Sampling:
    """Sampling parameters of answer `number` to a row: greedy, or as ``eval`` says, with the answer's seed."""
    settings = config.eval
    return Sampling(
        max_tokens=settings.max_tokens or config.rollout.max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        stop=config.rollout.stop,
        seed=sample_seed("eval", config.run.seed, f"{row_id}/{number}") if settings.temperature else None,
    )


def _labels(row: Prompt, number: int, labels: dict[str, Any]) -> dict[str, Any]:
    context = {} if row.context_id is None else {"context_id": row.context_id}
    return {**labels, "id": row.row_id, **context, "sample": number}


async def _answer(
    services: Services,
    config: Config,
    inputs: Inputs,
    requested: Requested,
    labels: dict[str, Any],
    files: RunFiles,
    with_context: bool,
    on_cut: Callable[[float], None],
) -> list[bool]:
    sequences = [
        teacher_sequence(row, inputs.contexts) if with_context else row.student_ids.tolist() for row, _ in requested
    ]
    samplings = [eval_sampling(config, row.row_id, number) for row, number in requested]
    answers = await services.generate(list(zip(sequences, samplings, strict=True)))
    on_cut(sum(answer.finish_reason == "length" for answer in answers) / len(answers))
    verdicts = []
    for (row, number), answer in zip(requested, answers, strict=True):
        verdicts.append(inputs.grader(answer.text, str(row.answer)))
        files.sample(
            {
                **_labels(row, number, labels),
                "answer": answer.text,
                "expected": row.answer,
                "right": verdicts[-1],
                "finish_reason": answer.finish_reason,
            }
        )
    return verdicts


async def _play(
    services: Services,
    config: Config,
    requested: Requested,
    labels: dict[str, Any],
    files: RunFiles,
    with_context: bool,
) -> list[bool]:
    games = [(row, eval_sampling(config, row.row_id, number)) for row, number in requested]
    episodes = await services.play(games, in_context=with_context)
    for (row, number), episode in zip(requested, episodes, strict=True):
        files.sample(
            {
                **_labels(row, number, labels),
                "exchanges": [asdict(exchange) for exchange in episode.exchanges],
                "outcome": episode.outcome,
                "reward": episode.reward,
                "right": episode.success,
            }
        )
    return [episode.success for episode in episodes]
