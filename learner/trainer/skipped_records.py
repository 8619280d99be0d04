"""A scored answer as plain values: what is written out when it broke a step. Pure."""

from __future__ import annotations

from typing import Any

import numpy as np

from common.protocol.schema import ScoredTrajectory

MOST_RECORDS = 16
"""Of one step and rank: enough to see what they have in common."""


def record(scored: ScoredTrajectory) -> dict[str, Any]:
    """Ids and both sides' log-probs of one answer, as JSON values (a number that is none becomes its name)."""
    trajectory, score = scored.trajectory, scored.score
    return {
        "sample_id": trajectory.sample_id,
        "row_id": trajectory.prompt.row_id,
        "step": trajectory.step,
        "versions": [list(span) for span in trajectory.versions],
        "finish_reason": trajectory.finish_reason,
        "teacher": trajectory.prompt.teacher,
        "teacher_fingerprint": scored.model_fingerprint,
        "teacher_version": scored.teacher_version,
        "context": trajectory.prompt.context,
        "context_id": trajectory.prompt.context_id,
        "prompt_ids": trajectory.prompt.student_ids.tolist(),
        "response_ids": trajectory.response_ids.tolist(),
        "engine_logprobs": _numbers(trajectory.sampled_logprobs),
        "teacher_logprobs": _numbers(score.sampled_logprob),
        "teacher_tail": _numbers(score.tail_logprob),
        "topk_ids": (trajectory.topk_ids if score.topk_ids is None else score.topk_ids).tolist(),
        "teacher_topk_logprobs": [_numbers(row) for row in score.logprobs],
    }


def _numbers(values: np.ndarray) -> list[float | str]:
    return [float(value) if np.isfinite(value) else str(value) for value in values]
