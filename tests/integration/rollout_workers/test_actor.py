"""The rollout worker as a Ray actor: concurrent calls, samples that cannot be scored, a kill that leaves no process."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import xxhash

from common.protocol.schema import ItemScore, Prompt, Sample, Sampling, ScoredTrajectory, Trajectory, as_ids
from common.protocol.scoring import ScoringError, TeacherError
from rollout_workers.actor import GROUPS, RolloutWorker
from tests.support.engines import PROMPT, K, run_config
from tests.support.processes import alive, command_of, descendants


class StubScorer:
    """Scores with zeros; refuses or fails by the row's name: the faults a real teacher shows rarely."""

    async def score(self, trajectory: Trajectory) -> ScoredTrajectory:
        if trajectory.prompt.row_id == "refused":
            raise ScoringError("refused by the teacher")
        if trajectory.prompt.row_id == "lost":
            raise TeacherError("the teacher is gone")
        tokens = len(trajectory.response_ids)
        score = ItemScore(np.zeros((tokens, K), np.float16), np.zeros(tokens, np.float32), np.zeros(tokens, np.float32))
        return ScoredTrajectory(trajectory, score, "stub", 0)

    async def close(self) -> None:
        pass


@dataclass(frozen=True)
class StubFactory:
    def __call__(self) -> StubScorer:
        return StubScorer()


@pytest.fixture(scope="module")
def worker(tiny_model: Path) -> Iterator[Any]:
    ray.init("local", num_cpus=2, log_to_driver=False, include_dashboard=False)
    root = os.getpid()
    actor = ray.remote(concurrency_groups=GROUPS)(RolloutWorker)
    handle = actor.options(num_cpus=0, max_concurrency=64).remote(
        str(tiny_model), run_config(tiny_model), StubFactory(), max_logprobs=K
    )
    ray.get(handle.ready.remote())
    yield handle
    engines = {pid for pid in descendants(root) if "VLLM" in command_of(pid)}
    ray.kill(handle)  # without a word: the engine has no chance to shut down
    deadline = time.monotonic() + 120
    while alive(engines) and time.monotonic() < deadline:
        time.sleep(0.2)
    left = alive(engines)
    ray.shutdown()
    assert engines
    assert not left


def sample_of(row: str, *, max_tokens: int = 12, **sampling: Any) -> Sample:
    prompt = Prompt(row_id=row, student_ids=as_ids(PROMPT), teacher_ids=as_ids(PROMPT), context=None)
    return Sample(0, 0, f"0/{row}", prompt, Sampling(max_tokens, **{"top_logprobs": K, "seed": 1, **sampling}))


def test_an_answer_comes_back_scored_and_its_summary_apart(worker: Any) -> None:
    summary, scored = ray.get(worker.rollout.remote(sample_of("row"), "scored"))
    assert summary.score.error is None
    assert summary.response_tokens == len(scored.trajectory.response_ids) == 12
    assert summary.prompt_tokens == len(PROMPT)
    assert summary.versions == ((0, 0),)
    assert summary.answer == xxhash.xxh64_intdigest(scored.trajectory.response_ids.tobytes())
    assert summary.started <= summary.ended <= summary.score.started <= summary.score.ended
    assert scored.trajectory.topk_ids.shape == (12, K)


def test_a_sample_that_cannot_be_scored_has_an_error_and_no_trajectory(worker: Any) -> None:
    summary, item = ray.get(worker.rollout.remote(sample_of("refused"), "scored"))
    assert summary.score.error == "refused by the teacher"
    assert item is None


def test_an_answer_can_be_made_first_and_scored_later(worker: Any) -> None:
    summary, answer = worker.rollout.remote(sample_of("row"), "trajectory")
    score, scored = worker.score.remote(answer)
    assert ray.get(summary).score is None
    assert ray.get(score).error is None
    assert np.array_equal(ray.get(scored).trajectory.response_ids, ray.get(answer).response_ids)


def test_a_lost_teacher_is_raised_to_the_caller(worker: Any) -> None:
    summary, _ = worker.rollout.remote(sample_of("lost"), "scored")
    with pytest.raises(TeacherError, match="the teacher is gone"):
        ray.get(summary)


def test_control_calls_do_not_wait_for_answers_in_flight(worker: Any) -> None:
    rollouts = [worker.rollout.remote(sample_of(f"row{i}", max_tokens=200), "scored")[0] for i in range(64)]
    ray.get(worker.ready.remote())  # 64 rollouts are all that the worker takes at a time
    _, unfinished = ray.wait(rollouts, num_returns=len(rollouts), timeout=0)
    assert unfinished
    assert len(ray.get(rollouts)) == 64


def test_a_cancelled_rollout_ends_in_the_engine_too(worker: Any) -> None:
    """The engine's other answers go on, and the cancelled one's id can be used again, which a running one's cannot."""
    sample = sample_of("cancelled", max_tokens=400)
    other, _ = worker.rollout.remote(sample_of("other", max_tokens=100), "trajectory")
    summary, _ = worker.rollout.remote(sample, "trajectory")
    time.sleep(0.3)
    ray.cancel(summary)
    with pytest.raises(ray.exceptions.RayError):
        ray.get(summary)
    again, _ = worker.rollout.remote(sample_of("cancelled", max_tokens=5), "trajectory")
    assert ray.get(again).response_tokens == 5
    assert ray.get(other).response_tokens == 100


def test_text_ends_before_the_stop(worker: Any) -> None:
    _, free = ray.get(worker.rollout.remote(sample_of("free", max_tokens=30, temperature=0.0), "text"))
    stop = next(character for character in free.text[5:] if character.isascii())
    sample = sample_of("stops", max_tokens=30, temperature=0.0, stop=(stop,))
    _, answer = ray.get(worker.rollout.remote(sample, "text"))
    assert answer.finish_reason == "stop"
    assert answer.text == free.text[: free.text.index(stop)]
