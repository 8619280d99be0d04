"""The rollout worker as a Ray actor: calls beside each other, samples that cannot be scored, what a kill leaves."""

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

from common.protocol.schema import ItemScore, Prompt, Sample, Sampling, ScoredTrajectory, Trajectory, as_ids
from common.protocol.scoring import ScoringError, TeacherError
from rollout_workers.actor import GROUPS, RolloutWorker
from rollout_workers.pool.outbox import Order
from tests.support.engines import PROMPT, K, run_config
from tests.support.processes import alive, command_of, descendants

pytestmark = pytest.mark.timeout(240)


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
    children = descendants(root)
    ray.kill(handle)  # without a word: the engine has no chance to shut down
    deadline = time.monotonic() + 15
    engines = {pid for pid in children if "VLLM" in command_of(pid)}
    while alive(engines) and time.monotonic() < deadline:
        time.sleep(0.2)
    left = alive(engines)
    ray.shutdown()
    assert engines
    assert not left


def order(row: str, *, ticket: int = 0, max_tokens: int = 12, scored: bool = True) -> Order:
    prompt = Prompt(row_id=row, student_ids=as_ids(PROMPT), teacher_ids=as_ids(PROMPT), context=None)
    return Order(ticket, Sample(0, 0, f"0/{row}", prompt, Sampling(max_tokens, top_k=K, seed=1)), scored)


def one(worker: Any, given: Order) -> tuple[Any, Any]:
    """(outcome, reference to the item) of an order."""
    outcomes, item = worker.exchange.options(num_returns=2).remote([given], [], 1)
    return ray.get(outcomes)[0], item


def test_an_answer_comes_back_scored_and_its_summary_apart(worker: Any) -> None:
    outcome, item = one(worker, order("row"))
    summary, scored = outcome.summary, ray.get(item)
    assert summary.score.error is None
    assert summary.response_tokens == len(scored.trajectory.response_ids) == 12
    assert summary.prompt_tokens == len(PROMPT)
    assert summary.versions == ((0, 0),)
    assert summary.started <= summary.ended <= summary.score.started <= summary.score.ended
    assert scored.trajectory.topk_ids.shape == (12, K)


def test_a_sample_that_cannot_be_scored_has_an_error_and_no_trajectory(worker: Any) -> None:
    outcome, item = one(worker, order("refused"))
    assert outcome.error is None
    assert outcome.summary.score.error == "refused by the teacher"
    assert ray.get(item) is None


def test_an_answer_can_be_made_first_and_scored_later(worker: Any) -> None:
    made, answer = one(worker, order("row", scored=False))
    score, scored = worker.score.remote(answer)
    assert made.summary.score is None
    assert ray.get(score).error is None
    assert np.array_equal(ray.get(scored).trajectory.response_ids, ray.get(answer).response_ids)


def test_a_lost_teacher_is_raised_to_the_caller(worker: Any) -> None:
    outcome, _ = one(worker, order("lost"))
    with pytest.raises(TeacherError, match="the teacher is gone"):
        raise outcome.error.as_instanceof_cause()


def test_control_calls_do_not_wait_for_answers_in_flight(worker: Any) -> None:
    orders = [order(f"row{i}", ticket=i, max_tokens=200) for i in range(64)]
    ray.get(worker.exchange.remote(orders, [], 0))
    generating = [worker.generate.remote([(PROMPT, Sampling(200))]) for _ in range(64)]  # as many as the worker takes
    ray.get(worker.ready.remote(), timeout=10)
    _, unfinished = ray.wait(generating, num_returns=len(generating), timeout=0)
    assert unfinished
    ended = 0
    while ended < 64:  # orders and their answers do not wait either
        outcomes, *_ = worker.exchange.options(num_returns=65).remote([], [], 64)
        ended += len(ray.get(outcomes, timeout=60))
    assert len(ray.get(generating)) == 64


def test_generated_text_ends_before_the_stop(worker: Any) -> None:
    free = ray.get(worker.generate.remote([(PROMPT, Sampling(30, 0.0))]))[0]
    stop = next(character for character in free.text[5:] if character.isascii())
    answer = ray.get(worker.generate.remote([(PROMPT, Sampling(30, 0.0, stop=(stop,)))]))[0]
    assert answer.finish_reason == "stop"
    assert answer.text == free.text[: free.text.index(stop)]
