"""Bounds how far rollouts run ahead of training, and evicts answers that are too old. Pure: no Ray, no clock.

Training step ``v`` makes weights of version ``v + 1`` out of version ``v``. A token made under version ``w`` and
trained in step ``v`` has age ``v - w``; `max_staleness` bounds the age of every trained token (0: strictly on-policy).

::

                         ┌────────────── reissue ──────────────┐
                         ▼                                     │
    may_issue ──► in flight ── finish ──► ready ── take ──► trained
                     │  │                   │                  (fills a position of the step)
                     │  └─ too old ─► evicted ◄─ advance ─┘
                     ├─ fail ────► failed    (its position stays empty: the step is one answer smaller)
                     └─ discard ─► discarded (from any state before training; another prompt takes its position)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

Versions = Sequence[tuple[int, int]]
"""(first response position, weight version) spans, as in `common.protocol.schema.Trajectory`."""


class StalenessError(RuntimeError):
    """An impossible call: a sample issued twice, a version from the future."""


class Verdict(StrEnum):
    """Result of `StalenessTracker.finish`."""

    READY = "ready"
    EVICTED = "evicted"


def version_tokens(versions: Versions, tokens: int) -> dict[int, int]:
    """Weight version -> number of the answer's `tokens` made under it.

    Raises StalenessError if the spans do not cover the answer from its first token on.
    """
    starts = [start for start, _ in versions]
    if tokens < 1 or not starts or starts[0] != 0 or starts != sorted(set(starts)) or starts[-1] >= tokens:
        raise StalenessError(f"version spans {tuple(versions)} do not fit an answer of {tokens} tokens")
    counts: Counter[int] = Counter()
    for (start, version), end in zip(versions, [*starts[1:], tokens], strict=True):
        counts[version] += end - start
    return dict(counts)


def token_ages(versions: Versions, tokens: int, version: int) -> dict[int, int]:
    """Age -> tokens, for an answer trained in step `version`. Raises StalenessError for a token of later weights."""
    ages = {version - made_under: count for made_under, count in version_tokens(versions, tokens).items()}
    if min(ages) < 0:
        raise StalenessError(
            f"step {version} cannot train on version spans {tuple(versions)}: they are of later weights"
        )
    return ages


@dataclass(slots=True)
class _Sample:
    """One issued sample: its order of first issue and, once finished, the versions and tokens of its answer."""

    order: int
    versions: Versions = ()
    tokens: int = 0

    @property
    def oldest(self) -> int:
        """Version of the oldest token."""
        return min(version for _, version in self.versions)


@dataclass
class StalenessTracker:
    """Accounts for every sample of a run, by id, from its issue to its end. An impossible call raises StalenessError.

    A step has ``samples_per_step`` positions, filled by trained and failed samples: the first answers to finish, those
    with older weights first. While a step has room, `oversample` samples more than positions may be in flight; the
    caller discards as many stragglers. A resumed run starts at its `version`, with all earlier positions filled. A run
    of `steps` (None: unlimited) has no positions after them.
    """

    max_staleness: int
    samples_per_step: int
    oversample: int = 0
    version: int = 0
    steps: int | None = None
    filled: int = field(init=False)
    """Positions filled since step 0."""
    counts: Counter[str] = field(default_factory=Counter, init=False)
    """``issued``, ``trained``, ``failed``, ``discarded``: samples. ``evicted``, ``reissued``: events."""
    _in_flight: dict[str, _Sample] = field(default_factory=dict, init=False)
    _ready: dict[str, _Sample] = field(default_factory=dict, init=False)
    _evicted: dict[str, _Sample] = field(default_factory=dict, init=False)
    _reissued: dict[str, int] = field(default_factory=dict, init=False)
    """Samples in flight again -> the version at their newest issue."""
    _ended: set[str] = field(default_factory=set, init=False)
    """Samples that ended since the last `advance`; earlier ones are forgotten, so a long run takes no more memory."""
    _ages: Counter[int] = field(default_factory=Counter, init=False)

    def __post_init__(self) -> None:
        if self.max_staleness < 0 or self.samples_per_step < 1 or self.oversample < 0 or self.version < 0:
            raise ValueError(
                f"max_staleness {self.max_staleness}, oversample {self.oversample} and version {self.version} must not "
                f"be negative, samples_per_step {self.samples_per_step} must be positive"
            )
        self.filled = self.version * self.samples_per_step

    # --- issuing ----------------------------------------------------------------------------------------------------

    def may_issue(self) -> int:
        """Number of samples that may be issued, or issued again, now.

        These are the positions up to step ``version + max_staleness`` that are neither filled nor reserved: a sample
        issued now can then be trained before it is too old, unless later samples overtake it.
        """
        return max(0, self._unreserved() + (self.oversample if self.room() else 0))

    def issue(self, sample_id: str) -> None:
        """Count a new sample as in flight, in an engine that holds `version` or a later one."""
        if sample_id in self._ended or any(sample_id in state for state in self._states().values()):
            raise StalenessError(f"sample {sample_id} was issued already")
        self._check_room(sample_id)
        self.counts["issued"] += 1
        self._in_flight[sample_id] = _Sample(order=self.counts["issued"])

    def reissue(self, sample_id: str) -> None:
        """Count an evicted sample as in flight again. (A sample whose worker died never left that state.)"""
        self._check_room(sample_id)
        sample = self._take_out(sample_id, "evicted")
        self.counts["reissued"] += 1
        self._in_flight[sample_id] = _Sample(order=sample.order)
        self._reissued[sample_id] = self.version

    # --- outcomes ----------------------------------------------------------------------------------------------------

    def finish(self, sample_id: str, versions: Versions, tokens: int) -> Verdict:
        """Take a scored answer: it is ready for training, or already too old."""
        token_ages(versions, tokens, self._next_step())
        sample = self._take_out(sample_id, "in_flight")
        sample.versions, sample.tokens = versions, tokens
        if self._too_old(sample):
            self._evict(sample_id, sample)
            return Verdict.EVICTED
        self._ready[sample_id] = sample
        return Verdict.READY

    def take(self) -> list[str]:
        """Samples to train now, in step `version`: ready ones, oldest weights first, as many as have a position.

        A sample that was issued again and would be too old after this step keeps a position until it is finished.
        Otherwise an answer that takes longer than `max_staleness` + 1 steps is sampled again and again, and never
        trained. Ready samples that would be too old go first.
        """
        if not (room := self.room()):
            return []
        due = self.version - self.max_staleness
        awaited = sum(issued_at <= due for issued_at in self._reissued.values())
        last_chance = sum(sample.oldest <= due for sample in self._ready.values())
        order = sorted(self._ready, key=lambda name: (self._ready[name].oldest, self._ready[name].order))
        taken = order[: min(room, max(room - awaited, last_chance))]
        for sample_id in taken:
            sample = self._take_out(sample_id, "ready")
            self._ages.update(token_ages(sample.versions, sample.tokens, self.version))
            self._end(sample_id, "trained")
            self.filled += 1
        return taken

    def fail(self, sample_id: str) -> None:
        """Drop a sample that cannot be scored. Its position stays empty, unless an oversampled one fills it."""
        self._take_out(sample_id, "in_flight")
        self._end(sample_id, "failed")
        if self._unreserved() > 0:
            self.filled += 1

    def discard(self, sample_id: str) -> None:
        """Drop a sample that was not trained (a straggler, an evicted one); its position is free for another prompt."""
        for name, state in self._states().items():
            if sample_id in state:
                self._take_out(sample_id, name)
                self._end(sample_id, "discarded")
                return
        raise StalenessError(f"sample {sample_id} is in no state from which it can be discarded")

    # --- steps ------------------------------------------------------------------------------------------------------

    def room(self) -> int:
        """Unfilled positions of step `version`; the step is complete at 0."""
        return max(0, self._positions_to(self.version + 1) - self.filled)

    def advance(self) -> list[str]:
        """Count version + 1 as published everywhere; returns the ready samples that are now too old.

        Raises StalenessError while the step has room.
        """
        if self.room():
            raise StalenessError(
                f"step {self.version} still has {self.room()} of {self.samples_per_step} positions to fill"
            )
        self.version += 1
        self._ages.clear()
        self._ended.clear()
        stale = [sample_id for sample_id, sample in self._ready.items() if self._too_old(sample)]
        for sample_id in stale:
            self._evict(sample_id, self._take_out(sample_id, "ready"))
        return stale

    # --- queries ----------------------------------------------------------------------------------------------------

    def stragglers(self) -> list[str]:
        """Samples in excess of all positions within reach, once the step is full: those in flight for longest first (a
        later step's have only just begun), then ready ones, last issued first.
        """
        excess = 0 if self.room() else max(0, -self._unreserved())
        order = [*_by_order(self._in_flight), *reversed(_by_order(self._ready))]
        return order[:excess]

    def evicted(self) -> list[str]:
        """Evicted samples, to be issued again or discarded, in the order of their first issue."""
        return _by_order(self._evicted)

    def outstanding(self) -> list[str]:
        """Samples that were issued and have not ended, in the order of first issue: a resumed run issues them first."""
        return _by_order({name: s for state in self._states().values() for name, s in state.items()})

    def audit(self) -> dict[str, int]:
        """Number of samples by state or outcome; ``issued`` is the sum of the others."""
        return {
            **{name: self.counts[name] for name in ("issued", "trained", "failed", "discarded")},
            **{name: len(state) for name, state in self._states().items()},
        }

    def metrics(self) -> dict[str, float]:
        """``staleness/tokens_age_A`` for A = 0 … `max_staleness`: share of this step's trained tokens of that age;
        ``staleness/mean_age`` and ``/max_age`` of them; ``/ahead``: samples in flight or ready, in steps; and totals.
        """
        tokens = sum(self._ages.values())
        shares = {
            f"staleness/tokens_age_{age}": self._ages[age] / tokens if tokens else 0.0
            for age in range(self.max_staleness + 1)
        }
        return {
            **shares,
            "staleness/mean_age": sum(age * n for age, n in self._ages.items()) / tokens if tokens else 0.0,
            "staleness/max_age": max(self._ages, default=0),
            "staleness/ahead": (len(self._in_flight) + len(self._ready)) / self.samples_per_step,
            **{f"staleness/{name}": self.counts[name] for name in ("evicted", "reissued", "discarded", "failed")},
        }

    # --- private ----------------------------------------------------------------------------------------------------

    def _states(self) -> dict[str, dict[str, _Sample]]:
        return {"in_flight": self._in_flight, "ready": self._ready, "evicted": self._evicted}

    def _unreserved(self) -> int:
        """Positions within reach minus filled ones and samples in flight or ready; negative when oversampled."""
        positions = self._positions_to(self.version + self.max_staleness + 1)
        return positions - self.filled - len(self._in_flight) - len(self._ready)

    def _positions_to(self, step: int) -> int:
        """Positions of all steps before `step`."""
        return (step if self.steps is None else min(step, self.steps)) * self.samples_per_step

    def _next_step(self) -> int:
        """The first step that still has room."""
        return self.version if self.room() else self.version + 1

    def _too_old(self, sample: _Sample) -> bool:
        return self._next_step() - sample.oldest > self.max_staleness

    def _evict(self, sample_id: str, sample: _Sample) -> None:
        self.counts["evicted"] += 1
        self._evicted[sample_id] = sample

    def _end(self, sample_id: str, how: str) -> None:
        self.counts[how] += 1
        self._ended.add(sample_id)

    def _take_out(self, sample_id: str, state: str) -> _Sample:
        sample = self._states()[state].pop(sample_id, None)
        if sample is None:
            raise StalenessError(f"sample {sample_id} is not {state.replace('_', ' ')}")
        self._reissued.pop(sample_id, None)
        return sample

    def _check_room(self, sample_id: str) -> None:
        if not self.may_issue():
            raise StalenessError(
                f"sample {sample_id} would run ahead of step {self.version} by more than {self.max_staleness} steps"
            )


def _by_order(samples: Mapping[str, _Sample]) -> list[str]:
    return sorted(samples, key=lambda name: samples[name].order)
