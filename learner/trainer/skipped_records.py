"""Scored trajectories of a skipped step as JSON values, for debugging."""

from __future__ import annotations

from typing import Any

import numpy as np

from common.protocol.schema import ScoredTrajectory

MAX_RECORDS = 16
"""Records kept per step and rank: enough to see what they have in common."""


def skipped_record(scored: ScoredTrajectory) -> dict[str, Any]:
    """Return ids and log-probs of one trajectory as JSON values; NaN and infinities become their names."""
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
