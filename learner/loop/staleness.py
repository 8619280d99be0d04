"""How far rollouts may run ahead of training, and which answers have become too old. Pure: no Ray, no clock.

Training step ``v`` makes weights of version ``v + 1`` out of version ``v``. A token made under version ``w`` and
trained in step ``v`` has age ``v - w``; `max_staleness` bounds the age of every trained token (0: strictly on-policy).

::

                         ┌────────────── reissue ──────────────┐
                         ▼                                     │
    may_issue ──► in flight ── finish ──► ready ── take ──► trained
                     │  │                   │                  (fills a place of the step)
                     │  └─ too old ─► evicted ◄─ advance ─┘
                     ├─ fail ────► failed    (its place stays empty: the step is one answer smaller)
                     └─ discard ─► discarded (from any state before training; another prompt takes its place)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

Versions = Sequence[tuple[int, int]]
"""(first response position, weight version) spans, as in `common.protocol.schema.Trajectory`."""


class StalenessError(RuntimeError):
    """The bookkeeping was told something that cannot be: a sample twice, a version from the future."""


class Verdict(StrEnum):
    """What becomes of a finished answer."""

    READY = "ready"
    EVICTED = "evicted"


def version_tokens(versions: Versions, tokens: int) -> dict[int, int]:
    """Weight version -> how many of the answer's `tokens` were made under it.

    Raises StalenessError where the spans do not cover the answer from its first token on.
    """
    starts = [start for start, _ in versions]
    if tokens < 1 or not starts or starts[0] != 0 or starts != sorted(set(starts)) or starts[-1] >= tokens:
        raise StalenessError(f"version spans {tuple(versions)} do not fit an answer of {tokens} tokens")
    counts: Counter[int] = Counter()
    for (start, version), end in zip(versions, [*starts[1:], tokens], strict=True):
        counts[version] += end - start
    return dict(counts)


def token_ages(versions: Versions, tokens: int, version: int) -> dict[int, int]:
    """Age -> tokens, were the answer trained in step `version`. Raises StalenessError for a token of later weights."""
    ages = {version - made: count for made, count in version_tokens(versions, tokens).items()}
    if min(ages) < 0:
        raise StalenessError(
            f"step {version} cannot train on version spans {tuple(versions)}: they are of later weights"
        )
    return ages


@dataclass(slots=True)
class _Sample:
    """One issued sample: its order of issue, the version it was last issued under, its answer once it is there."""

    place: int
    issued_at: int
    versions: Versions = ()
    tokens: int = 0

    @property
    def oldest(self) -> int:
        """Version of the oldest token."""
        return min(version for _, version in self.versions)


@dataclass
class StalenessTracker:
    """Accounts for every sample of a run, by id, from issue to its end. Every call that does not fit raises
    StalenessError.

    A step has ``samples_per_step`` places, filled by trained and failed samples; the first answers to finish are
    trained first, older ones ahead. While a step has room, `oversample` samples beyond the places may be on their way;
    whoever issues them discards as many stragglers. A resumed run starts at its `version`, with the places of the steps
    before it filled. A run of `steps` (None: of any number) has no places beyond them, and nothing is issued for such.
    """

    max_staleness: int
    samples_per_step: int
    oversample: int = 0
    version: int = 0
    steps: int | None = None
    filled: int = field(init=False)
    """Places filled since step 0."""
    counts: Counter[str] = field(default_factory=Counter, init=False)
    """``issued``, ``trained``, ``failed``, ``discarded``: samples. ``evicted``, ``reissued``: events."""
    _in_flight: dict[str, _Sample] = field(default_factory=dict, init=False)
    _ready: dict[str, _Sample] = field(default_factory=dict, init=False)
    _evicted: dict[str, _Sample] = field(default_factory=dict, init=False)
    _ended: set[str] = field(default_factory=set, init=False)
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
        """How many samples may be issued, or issued again, right now.

        Places up to step ``version + max_staleness`` that are neither filled nor spoken for: what is issued under these
        weights can then be trained before it is too old, unless later ones overtake it.
        """
        return max(0, self._unspoken() + (self.oversample if self.room() else 0))

    def issue(self, sample_id: str) -> None:
        """Note that a new sample is on its way to an engine that holds version `version` or a later one."""
        if sample_id in self._ended or any(sample_id in state for state in self._states().values()):
            raise StalenessError(f"sample {sample_id} was issued already")
        self._check_room(sample_id)
        self.counts["issued"] += 1
        self._in_flight[sample_id] = _Sample(place=self.counts["issued"], issued_at=self.version)

    def reissue(self, sample_id: str) -> None:
        """Send an evicted sample out again. (One whose worker died is still in flight: nothing to tell.)"""
        self._check_room(sample_id)
        sample = self._take_out(sample_id, "evicted")
        self.counts["reissued"] += 1
        self._in_flight[sample_id] = _Sample(place=sample.place, issued_at=self.version)

    # --- what becomes of a sample -----------------------------------------------------------------------------------

    def finish(self, sample_id: str, versions: Versions, tokens: int) -> Verdict:
        """The answer is there and scored: ready to be trained, or already too old."""
        token_ages(versions, tokens, self._next_step())
        sample = self._take_out(sample_id, "in_flight")
        sample.versions, sample.tokens = versions, tokens
        if self._too_old(sample):
            self._evict(sample_id, sample)
            return Verdict.EVICTED
        self._ready[sample_id] = sample
        return Verdict.READY

    def take(self) -> list[str]:
        """Samples to train in step `version`, now: as many as are ready and have a place, the oldest weights first."""
        if not self.room():
            return []
        order = sorted(self._ready, key=lambda name: (self._ready[name].oldest, self._ready[name].place))
        taken = order[: self.room()]
        for sample_id in taken:
            sample = self._ready.pop(sample_id)
            self._ages.update(token_ages(sample.versions, sample.tokens, self.version))
            self._end(sample_id, "trained")
            self.filled += 1
        return taken

    def fail(self, sample_id: str) -> None:
        """The sample cannot be scored. Its place stays empty, unless an over-issued one makes up for it."""
        self._take_out(sample_id, "in_flight")
        self._end(sample_id, "failed")
        if self._unspoken() > 0:
            self.filled += 1

    def discard(self, sample_id: str) -> None:
        """Give up a sample that was not trained (a straggler, an evicted one); its place is free for another prompt."""
        for state in self._states().values():
            if sample_id in state:
                del state[sample_id]
                self._end(sample_id, "discarded")
                return
        raise StalenessError(f"sample {sample_id} is not there to be discarded")

    # --- steps ------------------------------------------------------------------------------------------------------

    def room(self) -> int:
        """Places of step `version` that are still to be filled; the step is complete at 0."""
        return max(0, self._places_to(self.version + 1) - self.filled)

    def advance(self) -> list[str]:
        """Version + 1 is in the learner *and* in every engine. Returns ready samples that are too old from here on.

        Raises StalenessError while the step has room.
        """
        if self.room():
            raise StalenessError(
                f"step {self.version} still has {self.room()} of {self.samples_per_step} places to fill"
            )
        self.version += 1
        self._ages.clear()
        stale = [sample_id for sample_id, sample in self._ready.items() if self._too_old(sample)]
        for sample_id in stale:
            self._evict(sample_id, self._ready.pop(sample_id))
        return stale

    # --- what is where ----------------------------------------------------------------------------------------------

    def stragglers(self) -> list[str]:
        """Samples in excess of every place within reach, once the step is full: those in flight for longest, since a
        later step's have only just begun; then ready ones, issued last first.
        """
        excess = 0 if self.room() else max(0, -self._unspoken())
        order = [*_by_place(self._in_flight), *reversed(_by_place(self._ready))]
        return order[:excess]

    def overdue(self) -> list[str]:
        """In flight since weights that are too old by now: evicted when they finish, unless they waited in a queue."""
        return [i for i, s in self._in_flight.items() if self.version - s.issued_at > self.max_staleness]

    def evicted(self) -> list[str]:
        """Waiting to be issued again or discarded, in the order of their first issue."""
        return _by_place(self._evicted)

    def outstanding(self) -> list[str]:
        """All that was issued and has not ended, in the order of first issue: what a resumed run issues first."""
        return _by_place({name: s for state in self._states().values() for name, s in state.items()})

    def audit(self) -> dict[str, int]:
        """Where every sample is or ended: ``issued`` is the sum of the others."""
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

    # --- inside -----------------------------------------------------------------------------------------------------

    def _states(self) -> dict[str, dict[str, _Sample]]:
        return {"in_flight": self._in_flight, "ready": self._ready, "evicted": self._evicted}

    def _unspoken(self) -> int:
        """Places within reach less those filled and those a sample is on its way to; negative when over-issued."""
        places = self._places_to(self.version + self.max_staleness + 1)
        return places - self.filled - len(self._in_flight) - len(self._ready)

    def _places_to(self, step: int) -> int:
        """Places of all steps before `step`."""
        return (step if self.steps is None else min(step, self.steps)) * self.samples_per_step

    def _next_step(self) -> int:
        """The first step that can still train a sample: one that is full trains nothing more."""
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
        return sample

    def _check_room(self, sample_id: str) -> None:
        if not self.may_issue():
            raise StalenessError(
                f"sample {sample_id} would run ahead of step {self.version} by more than {self.max_staleness} steps"
            )


def _by_place(samples: Mapping[str, _Sample]) -> list[str]:
    return sorted(samples, key=lambda name: samples[name].place)
