"""The check of a teacher before the first step, on numbers: what passes, what must not."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from common.config.model import Config, LearnerConfig, TeacherConfig
from common.protocol.schema import ItemScore, Prompt, ScoredTrajectory, TokenSequence, Trajectory, as_ids
from common.protocol.scoring import ScoringError, TeacherError
from learner.cluster.services import Services
from learner.loop.teacher_check import ProbedTeacher, check_against_learner, check_teachers, has_students_weights
from tests.support.stub_loop import config_of

TOKENS = 32
PROBE = [
    (Prompt(f"row{i}", as_ids([i]), as_ids([i, 9]), None), TokenSequence(as_ids([i]), as_ids(range(TOKENS))))
    for i in range(8)
]
CONFIG = config_of(max_tokens=64)

Noise = Callable[[int, int], np.ndarray[Any, Any]]


def level(row: str) -> np.ndarray[Any, Any]:
    return np.random.default_rng(int(row.removeprefix("row"))).uniform(-6, -0.01, TOKENS)


class FakeScorer:
    """Returns fixed log-probs; `error(number of the request, requests under way)` is added to each."""

    def __init__(self, error: Noise) -> None:
        self._error = error
        self._running = 0
        self.asked: list[Trajectory] = []
        self.closed = False

    async def score(self, trajectory: Trajectory) -> ScoredTrajectory:
        self.asked.append(trajectory)
        number = len(self.asked)
        self._running += 1
        await asyncio.sleep(0.001)
        running, self._running = self._running, self._running - 1
        values = level(trajectory.prompt.row_id)[: len(trajectory.response_ids)]
        values = (values + self._error(number, running)[: len(values)]).astype(np.float32)
        ids = trajectory.topk_ids
        score = ItemScore(np.zeros(ids.shape, np.float16), values, values)
        return ScoredTrajectory(trajectory, score, "f", 0)

    async def close(self) -> None:
        self.closed = True


class FakeServices:
    """One teacher `t` of `section`, and a learner whose log-probs are off by `error`."""

    def __init__(self, section: TeacherConfig, dtype: str, error: float = 0.0) -> None:
        self.teachers = SimpleNamespace(all={"t": SimpleNamespace(section=section, info=SimpleNamespace(dtype=dtype))})
        self.learner_info = SimpleNamespace(dtype=dtype)
        self.asked: list[Any] = []
        self._error = error

    async def probe_learner(self, sequences: Any, temperature: float) -> list[np.ndarray[Any, Any]]:
        self.asked.append((sequences, temperature))
        return [level(f"row{one.prompt_ids[0]}") + self._error for one in sequences]


def noise(size: float) -> Noise:
    rng = np.random.default_rng(0)
    return lambda number, running: rng.normal(0, size, TOKENS)


def checked(
    error: Noise,
    section: TeacherConfig | None = None,
    dtype: str = "float32",
    learner: float = 0.0,
    config: Config = CONFIG,
) -> tuple[FakeScorer, FakeServices]:
    scorer, services = FakeScorer(error), FakeServices(section or TeacherConfig(), dtype, learner)
    asyncio.run(check_teachers(config, cast(Services, services), lambda: scorer, {}, PROBE))
    assert scorer.closed
    return scorer, services


def test_noise_of_the_dtype_passes_and_every_level_of_load_is_asked() -> None:
    for dtype, size in (("float32", 1e-5), ("bfloat16", 0.05)):
        scorer, services = checked(noise(size), dtype=dtype)
        assert len(scorer.asked) == 4 + 4 + 16
        assert {one.prompt.teacher for one in scorer.asked} == {"t"}
        ((sequences, temperature),) = services.asked
        assert [one.prompt_ids.tolist() for one in sequences] == [[i, 9] for i in range(4)]  # the teacher's prompts
        assert temperature == CONFIG.loss.temperature


def test_one_wrong_score_among_sixteen_is_refused() -> None:
    def error(number: int, running: int) -> np.ndarray[Any, Any]:
        return np.full(TOKENS, 1.0 if number == 20 else 0.0)

    for dtype in ("float32", "bfloat16"):
        with pytest.raises(TeacherError, match=r"^teacher 't' scores the same .* alone and 16 at once, by .*[^\n]*$"):
            checked(error, dtype=dtype)


def test_scores_that_drift_with_the_load_are_refused() -> None:
    with pytest.raises(TeacherError, match="alone and 4 at once"):
        checked(lambda number, running: np.full(TOKENS, 1e-4 * (running - 1)))


def test_what_is_no_number_is_refused() -> None:
    with pytest.raises(TeacherError, match="depend on its load"):
        checked(lambda number, running: np.full(TOKENS, math.nan if number == 7 else 0.0))


def test_a_teacher_of_the_students_weights_must_agree_with_the_learner() -> None:
    with pytest.raises(TeacherError, match="teacher 't' and the learner hold the same weights and differ by"):
        checked(noise(0), learner=3e-4)
    checked(noise(0), dtype="bfloat16", learner=3e-4)
    checked(noise(0), learner=1.0, section=TeacherConfig(model="another"))  # other weights: nothing to compare
    checked(noise(0), learner=1.0, section=TeacherConfig(url="http://t"))


@pytest.mark.parametrize(("limit", "compared"), [(TOKENS + 2, True), (TOKENS + 1, False)])
def test_the_learner_gets_no_sequence_that_its_memory_is_not_sized_for(
    limit: int, compared: bool, caplog: pytest.LogCaptureFixture
) -> None:
    config = CONFIG.model_copy(update={"learner": LearnerConfig(micro_batch_tokens=limit)})
    _, services = checked(noise(0), config=config)
    assert bool(services.asked) == compared
    assert ("was not compared with the learner" in caplog.text) != compared


def test_the_coarser_dtype_of_both_sets_the_bound() -> None:
    values = level("row0")
    for ours, theirs in (("float32", "bfloat16"), ("bfloat16", "float32")):
        check_against_learner(values, values + 0.1, ProbedTeacher("t", TeacherConfig(), theirs), ours, CONFIG)
    with pytest.raises(TeacherError, match=r"1\.00e-01"):
        check_against_learner(values, values + 0.1, ProbedTeacher("t", TeacherConfig(), "float32"), "float32", CONFIG)


def test_a_probe_that_cannot_be_scored_ends_the_run_and_closes_the_scorer() -> None:
    class Refuses(FakeScorer):
        async def score(self, trajectory: Trajectory) -> ScoredTrajectory:
            raise ScoringError("too_long")

    scorer = Refuses(noise(0))
    services = cast(Services, FakeServices(TeacherConfig(), "float32"))
    with pytest.raises(TeacherError, match="cannot score the probe: too_long"):
        asyncio.run(check_teachers(CONFIG, services, lambda: scorer, {}, PROBE))
    assert scorer.closed


def test_responses_are_cut_to_those_of_the_run() -> None:
    scorer = FakeScorer(noise(0))
    services = FakeServices(TeacherConfig(model="another"), "float32")
    short = config_of(max_tokens=8)
    asyncio.run(check_teachers(short, cast(Services, services), lambda: scorer, {}, PROBE))
    assert {len(one.response_ids) for one in scorer.asked} == {8}
    assert {one.topk_ids.shape for one in scorer.asked} == {(8, short.loss.top_k)}


def test_students_weights_are_known_by_model_and_place() -> None:
    assert has_students_weights(TeacherConfig(), "m")
    assert has_students_weights(TeacherConfig(model="m", kind="ema"), "m")
    assert not has_students_weights(TeacherConfig(model="n"), "m")
    assert not has_students_weights(TeacherConfig(model="m", url="http://t"), "m")
