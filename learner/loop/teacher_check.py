"""Checks before the first step that a teacher's scores can be trained on.

*Load*: the same sequence gets the same score alone and among others, up to the noise of the dtype. *Learner*: a
teacher that the run starts with the student's own weights agrees with the learner. The bounds are those of
`learner.loop.parity`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from common.config.model import Config, TeacherConfig
from common.data.rendering import teacher_sequence
from common.protocol.schema import Context, Prompt, TokenSequence, Trajectory, as_ids
from common.protocol.scoring import Scorer, ScorerFactory, ScoringError, TeacherError
from learner.cluster.services import Services
from learner.loop.parity import exceeded_bounds, parity_bounds

log = logging.getLogger(__name__)

CONCURRENCIES = (4, 16)
"""Scores that are asked for at once, after each sequence has been scored alone."""
SEQUENCES = 4
"""Sequences of the check: each is a whole context, a prompt and a short response."""

Values = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ProbedTeacher:
    """One teacher to check: its name in the run, its section, and the dtype that it computes in."""

    name: str
    section: TeacherConfig
    dtype: str


async def check_teachers(
    config: Config,
    services: Services,
    factory: ScorerFactory,
    contexts: Mapping[str, Context],
    probe: Sequence[tuple[Prompt, TokenSequence]],
) -> None:
    """Check all teachers of the run on `probe`, rows and responses to them. Raises TeacherError."""
    probe = [(row, cut(sequence, config.rollout.max_tokens)) for row, sequence in probe[:SEQUENCES]]
    info = services.learner_info
    assert info is not None
    scorer = factory()
    try:
        for name, teacher in services.teachers.all.items():
            assert teacher.info is not None
            probed = ProbedTeacher(name, teacher.section, teacher.info.dtype)
            trajectories = [_trajectory(name, row, sequence, config.loss.top_k) for row, sequence in probe]
            alone = await check_under_load(scorer, trajectories, probed, config)
            if has_students_weights(probed.section, config.student.model):
                sequences = [
                    TokenSequence(as_ids(teacher_sequence(row, contexts)), sequence.response_ids)
                    for row, sequence in probe
                ]
                if _fits_learner(sequences, probed.name, config.learner.micro_batch_tokens):
                    learner = await services.probe_learner(sequences, config.loss.temperature)
                    check_against_learner(alone, np.concatenate(learner), probed, info.dtype, config)
    except ScoringError as error:
        raise TeacherError(f"the teacher cannot score the probe: {error}") from error
    finally:
        await scorer.close()


def _fits_learner(sequences: Sequence[TokenSequence], teacher: str, limit: int) -> bool:
    """True if no sequence is longer than what the learner's memory is sized for; else it is logged."""
    longest = max(len(one.prompt_ids) + len(one.response_ids) for one in sequences)
    if longest > limit:
        log.warning(
            "teacher %r was not compared with the learner: the probe has %d tokens with its context, "
            "learner.micro_batch_tokens is %d",
            teacher,
            longest,
            limit,
        )
    return longest <= limit


def has_students_weights(teacher: TeacherConfig, student: str) -> bool:
    """True for a teacher that the run starts with the student's initial weights."""
    return teacher.url is None and teacher.model in (None, student)


async def check_under_load(
    scorer: Scorer, trajectories: Sequence[Trajectory], teacher: ProbedTeacher, config: Config
) -> Values:
    """Score each trajectory alone, then at `CONCURRENCIES`; returns the log-probs of the tokens, scored alone.

    Raises TeacherError if a score depends on the others by more than the noise of the teacher's dtype.
    """
    alone = [await _score(scorer, one) for one in trajectories]
    bounds = parity_bounds(config.sync, teacher.dtype)
    for concurrency in CONCURRENCIES:
        order = [index % len(trajectories) for index in range(concurrency)]
        scores = await asyncio.gather(*(_score(scorer, trajectories[index]) for index in order))
        expected = np.concatenate([alone[index] for index in order])
        difference = exceeded_bounds(np.concatenate(scores) - expected, bounds)
        if difference is not None:
            raise TeacherError(
                f"teacher {teacher.name!r} scores the same sequences differently alone and {concurrency} at once, by "
                f"{difference}: its answers depend on its load. Set teacher.batch_items=1 where the teacher is "
                "started, or use another backend"
            )
    return np.concatenate(alone)


def check_against_learner(
    teacher_logprobs: Values, learner_logprobs: NDArray[np.float32], teacher: ProbedTeacher, dtype: str, config: Config
) -> None:
    """Compare log-probs of the same tokens ``[T]`` at equal weights; `dtype` is the learner's. Raises TeacherError."""
    coarser = "bfloat16" if "bfloat16" in (dtype, teacher.dtype) else dtype
    difference = exceeded_bounds(teacher_logprobs - learner_logprobs, parity_bounds(config.sync, coarser))
    if difference is not None:
        raise TeacherError(
            f"teacher {teacher.name!r} and the learner hold the same weights and differ by {difference}: the "
            f"divergence would hold more than the context's effect. Set teacher.backend=transformers and "
            f"teacher.dtype={dtype}; if they still differ, train another model"
        )


def cut(sequence: TokenSequence, tokens: int) -> TokenSequence:
    """The sequence with at most `tokens` of its response, so that it fits wherever the run's answers do."""
    return replace(sequence, response_ids=sequence.response_ids[:tokens])


async def _score(scorer: Scorer, trajectory: Trajectory) -> Values:
    scored = await scorer.score(trajectory)
    return scored.score.sampled_logprob.astype(np.float64)


def _trajectory(teacher: str, row: Prompt, sequence: TokenSequence, k: int) -> Trajectory:
    """The probe as a rollout; the log-probs of the sampled tokens do not depend on the ids of its support."""
    tokens = len(sequence.response_ids)
    return Trajectory(
        sample_id=f"probe/{row.row_id}",
        step=0,
        prompt=replace(row, teacher=teacher),
        response_ids=sequence.response_ids,
        sampled_logprobs=np.zeros(tokens, dtype=np.float32),
        topk_ids=as_ids(np.tile(np.arange(k), (tokens, 1))),
        finish_reason="length",
        versions=((0, 0),),
    )
