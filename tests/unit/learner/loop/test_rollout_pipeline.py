"""Samples on their way to the learner: what is issued when, what a step gets, what a resumed run goes on with."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any, cast

import pytest

from common.config.loader import validate
from common.config.model import Config
from common.protocol.schema import Sample
from learner.cluster.services import Services
from learner.data.samples import SampleSource
from learner.loop.training_loop import RolloutPipeline, ScoredRollout
from tests.support.stub_loop import ROWS, StubServices, config_of


def stream_of(
    config: Config, services: StubServices, version: int = 0, begin: tuple[int, list[int]] = (0, [])
) -> RolloutPipeline:
    return RolloutPipeline(config, cast(Services, services), SampleSource(config, ROWS), version, *begin)


async def take(stream: RolloutPipeline, failed: list[ScoredRollout] | None = None) -> list[ScoredRollout]:
    return [answered async for answered in stream.step((failed if failed is not None else []).append)]


def ids(answers: list[ScoredRollout]) -> list[str]:
    return [answered.sample.sample_id for answered in answers]


async def test_a_strict_step_is_trained_on_its_own_samples_and_nothing_runs_ahead() -> None:
    services = StubServices()
    stream = stream_of(config_of(), services)
    first = await take(stream)
    assert {answered.sample.step for answered in first} == {0}
    assert len(services.asked) == len(first) == 4
    services.version = 1
    stream.advance()
    second = await take(stream)
    assert {answered.sample.step for answered in second} == {1}
    assert not set(ids(first)) & set(ids(second))


async def test_the_timeline_says_how_long_an_answer_was() -> None:
    """What `opcd simulate` is fitted to."""
    answered = (await take(stream_of(config_of(), StubServices())))[0]
    rollout = next(span for span in answered.spans if span.stage == "rollout")
    assert rollout.args == {"sample": answered.sample.sample_id, "prompt_tokens": 2, "response_tokens": 3}


async def test_a_pass_of_the_learner_over_several_answers_is_in_the_timeline_of_each() -> None:
    """With `teacher.kind: base` this pass is the score."""
    for answered in await take(stream_of(config_of(topk_from="learner"), StubServices())):
        assert {span.stage for span in answered.spans} == {"queue", "rollout", "topk", "score"}
        assert {span.args["sample"] for span in answered.spans} == {answered.sample.sample_id}


async def test_rollouts_run_ahead_by_the_staleness_that_is_allowed_and_slow_ones_are_trained_later() -> None:
    config = config_of(max_staleness=1)
    source = SampleSource(config, ROWS)
    services = StubServices(slow={source[0].sample_id})
    stream = stream_of(config, services)
    first = await take(stream)
    assert len(services.asked) == 8  # this step's and the next one's
    assert source[0].sample_id not in ids(first)
    assert len(first) == 4  # the slow one's place went to one that was ahead
    services.version = 1
    stream.advance()
    services.release.set()
    second = await take(stream)
    assert source[0].sample_id in ids(second)
    assert Counter(ids(first) + ids(second)).most_common(1)[0][1] == 1
    assert stream.tracker.metrics()["staleness/max_age"] == 1
    await stream.close()


async def test_an_answer_that_became_too_old_is_made_again() -> None:
    config = config_of(max_staleness=1)
    source = SampleSource(config, ROWS)
    late = source[0].sample_id
    services = StubServices(slow={late})
    stream = stream_of(config, services)
    for version in range(3):
        services.version = version
        assert late not in ids(await take(stream))
        stream.advance()
    services.slow = set()
    services.release.set()
    trained: list[str] = []
    for version in (3, 4):
        services.version = version
        trained += ids(await take(stream))
        stream.advance()
    assert trained.count(late) == 1
    assert services.asked.count(late) == 2
    assert stream.tracker.metrics()["staleness/evicted"] == 1
    await stream.close()


async def test_stragglers_beyond_the_batch_are_cut_off_and_counted() -> None:
    config = config_of(oversample_fraction=0.5)
    source = SampleSource(config, ROWS)
    services = StubServices(slow={source[1].sample_id, source[2].sample_id})
    stream = stream_of(config, services)
    first = await take(stream)
    assert len(services.asked) == 6
    assert len(first) == 4
    assert not {source[1].sample_id, source[2].sample_id} & set(ids(first))
    assert stream.tracker.metrics()["staleness/discarded"] == 2
    services.version = 1
    stream.advance()
    services.release.set()
    assert len(await take(stream)) == 4
    await stream.close()


async def test_what_is_longest_is_asked_for_first() -> None:
    class Lengths(StubServices):
        def _summary(self, sample: Sample, version: int) -> Any:
            summary = super()._summary(sample, version)
            summary.response_tokens = {"row1": 7, "row2": 2, "row3": 5}.get(sample.prompt.row_id, 3)
            return summary

    config = config_of(max_tokens=8)
    services = Lengths()
    stream = RolloutPipeline(config, cast(Services, services), SampleSource(config, ROWS[:6]), 0, 0, [])
    known: dict[str, int] = {}
    for version in range(4):
        services.version = version
        services.asked.clear()
        answers = {answered.sample.sample_id: answered for answered in await take(stream)}
        asked = [answers[sample_id].sample.prompt.row_id for sample_id in services.asked]
        expected = [known.get(row, 8) for row in asked]  # of a row that was never seen: the longest there may be
        assert expected == sorted(expected, reverse=True)
        known |= {one.sample.prompt.row_id: one.summary.response_tokens for one in answers.values()}
        stream.advance()
    assert len(known) == 6


async def test_with_rollouts_ahead_the_cut_is_of_the_late_ones() -> None:
    config = config_of(oversample_fraction=0.5, max_staleness=1)
    source = SampleSource(config, ROWS)
    late = {source[1].sample_id, source[2].sample_id}
    services = StubServices(slow={*late, *(source[number].sample_id for number in (6, 7, 8, 9))})
    stream = stream_of(config, services)
    assert len(await take(stream)) == 4
    assert late.isdisjoint(stream.tracker.outstanding())
    assert stream.tracker.outstanding() == [source[number].sample_id for number in (6, 7, 8, 9)]
    await stream.close()


async def test_nothing_is_issued_for_steps_that_the_run_does_not_have() -> None:
    config = config_of(max_staleness=2)
    config = config.model_copy(update={"learner": config.learner.model_copy(update={"steps": 3})})
    services = StubServices()
    stream = stream_of(config, services)
    for version in range(3):
        services.version = version
        assert len(await take(stream)) == 4
        stream.advance()
    await asyncio.sleep(0)
    assert len(services.asked) == 12
    await stream.close()


async def test_between_steps_nothing_is_issued() -> None:
    """An evaluation or a checkpoint comes there: what is made beside it is in no step's time."""
    services = StubServices()
    stream = stream_of(config_of(max_staleness=1), services)
    await take(stream)
    asked = len(services.asked)
    stream.advance()
    await asyncio.sleep(0.01)
    assert len(services.asked) == asked
    await stream.close()


async def test_a_sample_without_a_score_leaves_its_place_empty() -> None:
    config = config_of()
    services = StubServices(unscored={SampleSource(config, ROWS)[2].sample_id})
    failed: list[ScoredRollout] = []
    assert len(await take(stream_of(config, services), failed)) == 3
    assert [answered.error for answered in failed] == ["no"]


async def test_what_fails_on_the_way_is_raised_to_the_loop() -> None:
    class Broken(StubServices):
        async def rollout(self, sample: Sample, output: str) -> tuple[Any, Any]:
            raise RuntimeError("the teacher is gone")

    with pytest.raises(RuntimeError, match="the teacher is gone"):
        await take(stream_of(config_of(), Broken()))


async def test_the_learner_picks_the_ids_of_all_answers_in_full_groups_and_a_last_one() -> None:
    config = config_of(topk_from="learner")
    services = StubServices()
    answers = await take(stream_of(config, services))
    assert sorted(answered.item for answered in answers) == sorted(f"picked {name}" for name in services.asked)
    assert {answered.topk_agreement for answered in answers} == {0.5}
    assert sum(len(share) for group in services.groups for share in group) == 4
    assert {len(group) for group in services.groups} == {1}


async def test_a_step_does_not_wait_for_those_ahead_of_it_to_fill_a_group() -> None:
    config = config_of(topk_from="learner", max_staleness=1)
    source = SampleSource(config, ROWS)
    services = StubServices(slow={source[number].sample_id for number in range(4, 8)})
    stream = stream_of(config, services)
    first = await asyncio.wait_for(take(stream), 5)
    assert sorted(ids(first)) == sorted(source[number].sample_id for number in range(4))
    assert [sum(map(len, group)) for group in services.groups] == [4]
    await stream.close()


async def test_where_the_learner_is_the_teacher_nobody_else_is_asked() -> None:
    class NoTeacher(StubServices):
        async def score(self, sample: Sample, item: Any) -> tuple[Any, Any]:
            raise AssertionError("the learner has scored it")

    settings = {"learner": {"lora": {}}, "teacher": {"kind": "base"}}
    config = validate(Config, config_of().model_dump() | settings)
    services = NoTeacher()
    answers = await take(stream_of(config, services))
    assert sorted(answered.item for answered in answers) == sorted(f"picked {name}" for name in services.asked)


async def test_a_resumed_stream_goes_on_with_what_was_under_way() -> None:
    config = config_of(max_staleness=1)
    source = SampleSource(config, ROWS)
    services = StubServices(slow={source[0].sample_id, source[5].sample_id})
    stream = stream_of(config, services)
    first = await take(stream)
    services.version = 1
    stream.advance()
    position = stream.position()
    await stream.close()
    again = StubServices(version=1)
    resumed = stream_of(config, again, 1, (position["next"], position["again"]))
    trained = ids(first)
    for version in (1, 2):
        again.version = version
        trained += ids(await take(resumed))
        resumed.advance()
    assert Counter(trained).most_common(1)[0][1] == 1
    assert {source[number].sample_id for number in range(8)} <= set(trained)
    await resumed.close()


def test_samples_are_a_function_of_their_number() -> None:
    source = SampleSource(config_of(samples_per_prompt=2, topk_from="learner"), ROWS)
    assert source.per_step == 8
    again = SampleSource(config_of(samples_per_prompt=2, topk_from="learner"), ROWS)
    assert [source[n] for n in (9, 0, 17)] == [again[n] for n in (9, 0, 17)]
    assert source[8].prompt == source[9].prompt
    assert source[8].sampling.seed != source[9].sampling.seed
    assert [source[n].sampling.top_logprobs for n in range(8, 12)] == [4, 0, 0, 0]  # one a step, to compare
    assert Path(source[8].sample_id).parts[0] == "1"
