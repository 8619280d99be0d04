"""Nothing too old is trained, nothing is lost, nothing is trained twice: with any order of events."""

from __future__ import annotations

import pickle
import random
from collections import Counter, deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.loop.staleness import StalenessError, StalenessTracker, Verdict, token_ages, version_tokens


def filled_with(tracker: StalenessTracker, names: str) -> None:
    for name in names:
        tracker.issue(name)


def test_spans_become_tokens_by_version_and_age() -> None:
    assert version_tokens([(0, 4), (3, 5), (7, 6)], 10) == {4: 3, 5: 4, 6: 3}
    assert version_tokens([(0, 4), (3, 5), (4, 4)], 6) == {4: 5, 5: 1}
    assert token_ages([(0, 4), (3, 5)], 10, 6) == {2: 3, 1: 7}


@pytest.mark.parametrize("spans", [[], [(1, 0)], [(0, 0), (0, 1)], [(0, 0), (5, 1)], [(0, 0), (3, 1), (2, 2)]])
def test_spans_that_leave_tokens_without_a_version_are_refused(spans: list[tuple[int, int]]) -> None:
    with pytest.raises(StalenessError, match="do not fit an answer of 5 tokens"):
        version_tokens(spans, 5)


def test_strict_training_issues_one_step_and_waits_for_it() -> None:
    tracker = StalenessTracker(max_staleness=0, samples_per_step=2)
    filled_with(tracker, "ab")
    assert tracker.may_issue() == 0
    with pytest.raises(StalenessError, match="ahead of step 0"):
        tracker.issue("c")
    assert tracker.finish("b", [(0, 0)], 5) is Verdict.READY
    assert tracker.take() == ["b"]
    assert tracker.may_issue() == 0
    with pytest.raises(StalenessError, match="still has 1 of 2"):
        tracker.advance()
    assert tracker.finish("a", [(0, 0)], 5) is Verdict.READY
    assert tracker.take() == ["a"]
    assert tracker.may_issue() == 0
    assert tracker.advance() == []
    assert tracker.may_issue() == 2


def test_an_answer_that_is_made_again_is_waited_for() -> None:
    """Otherwise an answer that takes three steps is made again and again."""
    tracker = StalenessTracker(max_staleness=1, samples_per_step=2)

    def ready(version: int, names: str) -> None:
        for name in names:
            assert tracker.finish(name, [(0, version)], 5) is Verdict.READY

    filled_with(tracker, "abcd")
    ready(0, "bc")
    assert tracker.take() == ["b", "c"]
    tracker.advance()
    filled_with(tracker, "ef")
    ready(0, "d")
    ready(1, "e")
    assert tracker.take() == ["d", "e"]  # the first time it is not waited for
    tracker.advance()
    assert tracker.finish("a", [(0, 0)], 5) is Verdict.EVICTED
    tracker.reissue("a")
    filled_with(tracker, "g")
    ready(1, "f")
    ready(2, "g")
    assert tracker.take() == ["f", "g"]  # it can be trained in the next step
    tracker.advance()
    filled_with(tracker, "hi")
    ready(3, "hi")
    assert tracker.take() == ["h"]
    assert tracker.take() == []
    assert tracker.room() == 1
    ready(2, "a")
    assert tracker.take() == ["a"]
    assert tracker.counts["evicted"] == 1
    tracker.advance()
    filled_with(tracker, "jk")
    ready(4, "j")
    assert tracker.take() == ["i", "j"]  # nothing is awaited any more


@pytest.mark.parametrize("end", ["fail", "discard"])
def test_an_answer_that_will_not_come_is_not_awaited(end: str) -> None:
    tracker = StalenessTracker(max_staleness=0, samples_per_step=2)
    filled_with(tracker, "ab")
    assert tracker.finish("a", [(0, 0)], 5) is Verdict.READY
    assert tracker.take() == ["a"]
    assert tracker.finish("b", [(0, -1)], 5) is Verdict.EVICTED
    tracker.reissue("b")
    getattr(tracker, end)("b")
    while tracker.room():
        for name in (names := [f"{end}{number}" for number in range(tracker.may_issue())]):
            tracker.issue(name)
            tracker.finish(name, [(0, 0)], 5)
        assert tracker.take() == names
    tracker.advance()
    filled_with(tracker, "cd")
    for name in "cd":
        tracker.finish(name, [(0, 1)], 5)
    assert tracker.take() == ["c", "d"]


def test_an_answer_that_is_made_again_does_not_make_ready_ones_too_old() -> None:
    tracker = StalenessTracker(max_staleness=1, samples_per_step=1)
    filled_with(tracker, "ab")
    assert tracker.finish("b", [(0, 0)], 5) is Verdict.READY
    assert tracker.take() == ["b"]
    tracker.advance()
    tracker.issue("c")
    assert tracker.finish("c", [(0, 1)], 5) is Verdict.READY
    assert tracker.take() == ["c"]
    tracker.advance()
    assert tracker.finish("a", [(0, 0)], 5) is Verdict.EVICTED
    tracker.reissue("a")
    tracker.issue("d")
    assert tracker.finish("d", [(0, 2)], 5) is Verdict.READY
    assert tracker.take() == ["d"]
    tracker.advance()
    tracker.issue("f")
    assert tracker.finish("f", [(0, 2)], 5) is Verdict.READY
    assert tracker.take() == ["f"]  # as old as a


def test_a_long_run_takes_no_more_memory() -> None:
    def size(steps: int) -> int:
        tracker = StalenessTracker(max_staleness=1, samples_per_step=4)
        for step in range(steps):
            names = [f"{step}/{number}" for number in range(tracker.may_issue())]
            for name in names:
                tracker.issue(name)
                tracker.finish(name, [(0, step)], 5)
            tracker.take()
            tracker.advance()
        return len(pickle.dumps(tracker))

    assert abs(size(500) - size(10)) < 100


def test_strict_training_evicts_an_answer_that_saw_a_sync() -> None:
    tracker = StalenessTracker(max_staleness=0, samples_per_step=1, version=3)
    tracker.issue("a")
    assert tracker.finish("a", [(0, 2), (4, 3)], 5) is Verdict.EVICTED
    assert tracker.take() == []
    assert tracker.evicted() == ["a"]
    tracker.reissue("a")
    assert tracker.finish("a", [(0, 3)], 5) is Verdict.READY
    assert tracker.take() == ["a"]
    assert tracker.counts == {"issued": 1, "evicted": 1, "reissued": 1, "trained": 1}


def test_rollouts_run_ahead_by_whole_steps() -> None:
    tracker = StalenessTracker(max_staleness=2, samples_per_step=4)
    assert tracker.may_issue() == 12
    filled_with(tracker, "abcdefgh")
    assert tracker.may_issue() == 4
    for name in "abcd":
        tracker.finish(name, [(0, 0)], 1)
    assert len(tracker.take()) == 4
    assert tracker.may_issue() == 4  # trained samples keep their places
    tracker.advance()
    assert tracker.may_issue() == 8


def test_a_straggler_that_others_overtook_is_evicted_when_it_ends() -> None:
    tracker = StalenessTracker(max_staleness=1, samples_per_step=1)
    filled_with(tracker, "ab")
    for version, name in enumerate("bc"):
        tracker.finish(name, [(0, version)], 1)
        assert tracker.take() == [name]
        tracker.advance()
        if name == "b":
            tracker.issue("c")
    assert tracker.finish("a", [(0, 0), (2, 2)], 3) is Verdict.EVICTED
    assert tracker.audit() == {
        "issued": 3, "trained": 2, "failed": 0, "discarded": 0, "in_flight": 0, "ready": 0, "evicted": 1,
    }  # fmt: skip


def test_ready_answers_that_grow_too_old_leave_at_the_sync() -> None:
    tracker = StalenessTracker(max_staleness=0, samples_per_step=1, oversample=1)
    filled_with(tracker, "ab")
    for name in "ab":
        assert tracker.finish(name, [(0, 0)], 3) is Verdict.READY
    assert tracker.take() == ["a"]
    assert tracker.advance() == ["b"] == tracker.evicted()


def test_the_oldest_weights_are_trained_first() -> None:
    tracker = StalenessTracker(max_staleness=2, samples_per_step=1)
    filled_with(tracker, "abc")
    tracker.finish("a", [(0, 0)], 1)
    tracker.take()
    assert tracker.metrics()["staleness/tokens_age_0"] == 1.0
    tracker.advance()
    tracker.finish("b", [(0, 1)], 1)  # begun late by a busy engine
    tracker.finish("c", [(0, 0), (3, 1)], 4)
    assert tracker.take() == ["c"]
    assert tracker.metrics()["staleness/tokens_age_1"] == 0.75
    assert tracker.metrics()["staleness/ahead"] == 1.0


def test_an_answer_that_ends_during_the_sync_may_hold_the_next_version() -> None:
    tracker = StalenessTracker(max_staleness=1, samples_per_step=1)
    filled_with(tracker, "ab")
    with pytest.raises(StalenessError, match="later weights"):
        tracker.finish("b", [(0, 0), (1, 1)], 2)
    tracker.finish("a", [(0, 0)], 2)
    tracker.take()
    assert tracker.finish("b", [(0, 0), (1, 1)], 2) is Verdict.READY
    assert tracker.take() == []
    tracker.advance()
    assert tracker.take() == ["b"]
    metrics = tracker.metrics()
    assert metrics["staleness/tokens_age_0"] == metrics["staleness/tokens_age_1"] == 0.5
    assert metrics["staleness/mean_age"] == 0.5
    assert metrics["staleness/max_age"] == 1


def test_a_failed_sample_makes_the_step_smaller() -> None:
    tracker = StalenessTracker(max_staleness=0, samples_per_step=2)
    filled_with(tracker, "ab")
    tracker.fail("a")
    tracker.finish("b", [(0, 0)], 1)
    assert tracker.take() == ["b"]
    assert tracker.room() == 0


def test_over_issued_samples_make_up_for_stragglers_and_failures() -> None:
    tracker = StalenessTracker(max_staleness=0, samples_per_step=2, oversample=2)
    filled_with(tracker, "abcd")
    assert tracker.may_issue() == 0
    tracker.fail("a")
    for name in "bc":
        tracker.finish(name, [(0, 0)], 1)
    assert tracker.take() == ["b", "c"]
    assert tracker.room() == 0
    assert tracker.may_issue() == 0  # not ahead of the sync
    assert tracker.advance() == []
    tracker.discard("d")
    assert tracker.may_issue() == 4
    assert tracker.counts == {"issued": 4, "failed": 1, "trained": 2, "discarded": 1}


def test_with_rollouts_ahead_the_late_ones_of_the_step_are_cut_off_and_not_the_next_steps() -> None:
    tracker = StalenessTracker(max_staleness=1, samples_per_step=2, oversample=2)
    filled_with(tracker, "abcdef")  # two steps' and two more
    for name in "be":
        tracker.finish(name, [(0, 0)], 1)
    assert tracker.take() == ["b", "e"]
    assert tracker.stragglers() == ["a", "c"]  # of d and f, which are the next step's, none has had its time
    for name in "df":
        tracker.finish(name, [(0, 0)], 1)
    assert tracker.stragglers() == ["a", "c"]


def test_nothing_is_issued_beyond_the_last_step() -> None:
    tracker = StalenessTracker(max_staleness=2, samples_per_step=2, oversample=1, version=1, steps=3)
    assert tracker.may_issue() == 5  # of steps 1 and 2, and one more
    filled_with(tracker, "abcde")
    for name in "abc":
        tracker.finish(name, [(0, 1)], 1)
    assert tracker.take() == ["a", "b"]
    assert tracker.stragglers() == ["d"]
    tracker.discard("d")
    tracker.advance()
    assert tracker.may_issue() == 1  # in the place of one that may be late
    tracker.finish("e", [(0, 1)], 1)
    assert tracker.take() == ["c", "e"]
    tracker.advance()
    assert (tracker.room(), tracker.may_issue(), tracker.outstanding()) == (0, 0, [])


def test_a_resumed_run_counts_the_steps_before_it() -> None:
    tracker = StalenessTracker(max_staleness=1, samples_per_step=3, version=7)
    assert tracker.may_issue() == 6
    filled_with(tracker, "abc")
    tracker.finish("b", [(0, 7)], 1)
    assert tracker.outstanding() == ["a", "b", "c"]


def test_what_cannot_be_is_refused() -> None:
    tracker = StalenessTracker(max_staleness=1, samples_per_step=1)
    tracker.issue("a")
    for call in (
        lambda: tracker.issue("a"),
        lambda: tracker.finish("x", [(0, 0)], 1),
        lambda: tracker.reissue("a"),
        lambda: tracker.fail("x"),
        lambda: tracker.discard("x"),
    ):
        with pytest.raises(StalenessError):
            call()
    tracker.discard("a")
    with pytest.raises(StalenessError, match="issued already"):
        tracker.issue("a")
    with pytest.raises(ValueError, match="samples_per_step 0"):
        StalenessTracker(max_staleness=0, samples_per_step=0)


def run_steps(tracker: StalenessTracker, steps: int, reorder: random.Random | None = None) -> None:
    """Answers finish in the order of issue, or in any; evicted ones go out again first."""
    flying: deque[tuple[str, int]] = deque()
    number = 0
    while tracker.version < steps:
        for _ in range(tracker.may_issue()):
            back = tracker.evicted()[:1]
            if back:
                tracker.reissue(back[0])
            else:
                tracker.issue(str(number))
                number += 1
            flying.append((*(back or [str(number - 1)]), tracker.version))
        if reorder:
            flying.rotate(-reorder.randrange(len(flying)))
        name, version = flying.popleft()
        tracker.finish(name, [(0, version)], 1)
        tracker.take()
        if not tracker.room():
            tracker.advance()


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_answers_that_finish_in_order_are_never_evicted(max_staleness: int) -> None:
    tracker = StalenessTracker(max_staleness=max_staleness, samples_per_step=3)
    run_steps(tracker, 12)
    assert tracker.counts["evicted"] == 0
    assert tracker.counts["trained"] == 36


def test_stragglers_go_out_again_and_every_step_is_full() -> None:
    tracker = StalenessTracker(max_staleness=1, samples_per_step=4)
    run_steps(tracker, 50, random.Random(0))
    assert tracker.counts["trained"] == 200
    assert tracker.counts["evicted"] > 0
    assert tracker.counts["evicted"] - tracker.counts["reissued"] == len(tracker.evicted())


class Trained:
    """Versions of every trained token, seen from outside: the oracle of the property below."""

    def __init__(self, tracker: StalenessTracker) -> None:
        self.tracker = tracker
        self.answers: dict[str, list[int]] = {}
        self.times: Counter[str] = Counter()

    def take(self) -> None:
        for name in self.tracker.take():
            self.times[name] += 1
            ages = [self.tracker.version - version for version in self.answers[name]]
            assert 0 <= min(ages) <= max(ages) <= self.tracker.max_staleness


def spans_of(versions: list[int]) -> list[tuple[int, int]]:
    return [(i, v) for i, v in enumerate(versions) if i == 0 or v != versions[i - 1]]


@settings(max_examples=150)
@given(
    max_staleness=st.integers(0, 3),
    samples_per_step=st.integers(1, 4),
    oversample=st.integers(0, 3),
    seed=st.integers(0, 2**32 - 1),
    moves=st.integers(20, 150),
)
def test_any_order_of_events_keeps_the_promises(
    max_staleness: int, samples_per_step: int, oversample: int, seed: int, moves: int
) -> None:
    rng = random.Random(seed)
    tracker = StalenessTracker(max_staleness, samples_per_step, oversample)
    trained = Trained(tracker)
    started: dict[str, int] = {}
    issued = failed = discarded = 0

    def fly(name: str) -> None:
        started[name] = tracker.version

    def finish(name: str) -> None:
        # The engine may have begun it late, and gone through every version since; a full step's successor is out soon.
        first, last = rng.randint(started.pop(name), tracker.version), tracker.version + (not tracker.room())
        trained.answers[name] = sorted(rng.choices(range(first, last + 1), k=rng.randint(1, 6)))
        tracker.finish(name, spans_of(trained.answers[name]), len(trained.answers[name]))

    for _ in range(moves):
        move = rng.choice(["issue", "issue", "finish", "finish", "finish", "take", "advance", "rare"])
        if move == "issue" and tracker.may_issue():
            back = tracker.evicted()
            if back:
                tracker.reissue(back[0])
                fly(back[0])
            else:
                tracker.issue(f"s{issued}")
                fly(f"s{issued}")
                issued += 1
        elif move == "finish" and started:
            finish(rng.choice(sorted(started)))
        elif move == "take":
            trained.take()
        elif move == "advance" and not tracker.room():
            tracker.advance()
        elif move == "rare" and started:
            name = rng.choice(sorted(started))
            del started[name]
            if rng.random() < 0.5:
                tracker.fail(name)
                failed += 1
            else:
                tracker.discard(name)
                discarded += 1
        audit = tracker.audit()
        assert audit["issued"] == issued == sum(n for name, n in audit.items() if name != "issued")
        assert (audit["failed"], audit["discarded"]) == (failed, discarded)
        assert set(started) <= set(tracker.outstanding())
        assert tracker.filled <= (tracker.version + max_staleness + 1) * samples_per_step

    # Whatever happened, the run can go on to its end: nothing is stuck.
    goal = tracker.version + max_staleness + 2
    while tracker.version < goal:
        for name in tracker.evicted()[: tracker.may_issue()]:
            tracker.reissue(name)
            fly(name)
        while tracker.may_issue() and tracker.room():
            tracker.issue(f"s{issued}")
            fly(f"s{issued}")
            issued += 1
        trained.take()
        while tracker.room() and started:
            finish(rng.choice(sorted(started)))
            trained.take()
        if not tracker.room():
            tracker.advance()
    assert set(trained.times.values()) <= {1}
    assert len(trained.times) == tracker.counts["trained"]
