"""Greedy answers on held-out rows, graded and written down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from common.chat import teacher_sequence
from common.config import Config
from common.evaluation import Accuracy, accuracy, grade
from common.schema import Prompt, Sampling
from common.telemetry import RunFiles
from learner.inputs import Inputs
from learner.services import Services


async def evaluate_rows(
    services: Services,
    config: Config,
    inputs: Inputs,
    rows: Sequence[Prompt],
    name: str,
    step: int,
    files: RunFiles,
    with_context: bool,
) -> Accuracy:
    """Generate greedily, grade, write every answer down; games are played, and right where they were won."""
    sampling = Sampling(
        max_tokens=config.eval.max_tokens or config.rollout.max_tokens, temperature=0.0, stop=config.rollout.stop
    )
    games = [row for row in rows if row.game is not None]
    prompts = [row for row in rows if row.game is None]
    verdicts: list[bool] = []
    if prompts:
        verdicts += await _answer(services, inputs, prompts, sampling, {"set": name, "step": step}, files, with_context)
    if games:
        verdicts += await _play(services, games, sampling, {"set": name, "step": step}, files, with_context)
    return accuracy(verdicts)


async def _answer(
    services: Services,
    inputs: Inputs,
    rows: Sequence[Prompt],
    sampling: Sampling,
    labels: dict[str, Any],
    files: RunFiles,
    with_context: bool,
) -> list[bool]:
    sequences = [teacher_sequence(row, inputs.contexts) if with_context else row.student_ids.tolist() for row in rows]
    answers = await services.generate(sequences, sampling)
    expected = [str(row.answer) for row in rows]
    right = grade([answer.text for answer in answers], expected, inputs.grader)
    for row, answer, verdict in zip(rows, answers, right, strict=True):
        files.sample(
            {
                **labels,
                "id": row.row_id,
                "answer": answer.text,
                "expected": row.answer,
                "right": verdict,
                "finish_reason": answer.finish_reason,
            }
        )
    return right


async def _play(
    services: Services,
    rows: Sequence[Prompt],
    sampling: Sampling,
    labels: dict[str, Any],
    files: RunFiles,
    with_context: bool,
) -> list[bool]:
    episodes = await services.play(rows, sampling, in_context=with_context)
    for row, episode in zip(rows, episodes, strict=True):
        files.sample(
            {
                **labels,
                "id": row.row_id,
                "exchanges": [asdict(exchange) for exchange in episode.exchanges],
                "outcome": episode.outcome,
                "reward": episode.reward,
                "right": episode.success,
            }
        )
    return [episode.success for episode in episodes]
