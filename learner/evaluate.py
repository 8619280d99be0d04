"""Greedy answers on held-out rows, graded and written down."""

from __future__ import annotations

from collections.abc import Sequence

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
    """Generate greedily, grade, write every answer down."""
    sampling = Sampling(
        max_tokens=config.eval.max_tokens or config.rollout.max_tokens, temperature=0.0, stop=config.rollout.stop
    )
    sequences = [teacher_sequence(row, inputs.contexts) if with_context else row.student_ids.tolist() for row in rows]
    answers = await services.generate(sequences, sampling)
    expected = [str(row.answer) for row in rows]
    right = grade([answer.text for answer in answers], expected, inputs.grader)
    for row, answer, verdict in zip(rows, answers, right, strict=True):
        files.sample(
            {
                "set": name,
                "step": step,
                "id": row.row_id,
                "answer": answer.text,
                "expected": row.answer,
                "right": verdict,
                "finish_reason": answer.finish_reason,
            }
        )
    return accuracy(right)
