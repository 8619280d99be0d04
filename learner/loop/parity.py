"""Checks that a weight sync arrived: engine and learner must agree on fixed token sequences. Pure.

Two tests follow every sync. *Level*: no sampled token's log-prob differs by more than a bound. *Change*: the engine's
log-probs moved as the learner's did, since the version before and since version 0. Without the second test a stale
layer passes at small learning rates, because one step moves log-probs by less than the bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NOISE_FLOORS = 3.0
"""Allowed error of a change of any size, in noise floors (rms difference at version 0)."""

Values = NDArray[np.float64]
LogProbs = Sequence[NDArray[np.float32]]


class ParityError(RuntimeError):
    """Engine and learner disagree: rollouts would come from other weights than those being trained."""


@dataclass(frozen=True, slots=True)
class ParityReport:
    """Differences over the probe's tokens, in nats. `change_ratio`: rms of (engine's change - learner's change) over
    rms of the learner's change since the version before; `noise_nats`: rms difference at version 0.
    """

    max_nats: float
    rms_nats: float
    change_ratio: float
    noise_nats: float


class ParityGate:
    """Compares one engine with the learner at every version; raises ParityError, also for NaN and missing values."""

    def __init__(self, parity_nats: float, change_ratio: float) -> None:
        self._bound = parity_nats
        self._ratio = change_ratio
        self._first: tuple[Values, Values] | None = None
        self._last: tuple[Values, Values] | None = None
        self._noise = 0.0

    def begin(self, engine: LogProbs, learner: LogProbs) -> ParityReport:
        """Measure the noise floor at version 0, where both hold the same weights."""
        pair = _aligned(0, engine, learner)
        self._noise = _rms(pair[0] - pair[1])
        self._first = self._last = pair
        self._check_level(0, *pair)
        return self._report(pair, change_ratio=0.0)

    def check(self, version: int, engine: LogProbs, learner: LogProbs) -> ParityReport:
        """Compare after the sync of `version`, on the same sequences as `begin`."""
        if self._first is None or self._last is None:
            raise ParityError("parity was checked before the noise floor was measured at version 0")
        pair = _aligned(version, engine, learner)
        if pair[0].shape != self._first[0].shape:
            raise ParityError(f"version {version}: the probe has {pair[0].size} tokens, it had {self._first[0].size}")
        self._check_level(version, *pair)
        self._check_change(version, "version 0", pair, self._first)
        ratio = self._check_change(version, "the version before", pair, self._last)
        self._last = pair
        return self._report(pair, ratio)

    def _check_level(self, version: int, engine: Values, learner: Values) -> None:
        worst = float(np.abs(engine - learner).max())
        if not worst <= self._bound:
            raise ParityError(
                f"weight version {version}: engine and learner differ by {worst:.2e} nats on a sampled token, at most "
                f"{self._bound:.2e} is allowed (sync.parity_nats); the engine did not get these weights, or computes "
                "in another precision"
            )

    def _check_change(
        self, version: int, since: str, now: tuple[Values, Values], before: tuple[Values, Values]
    ) -> float:
        """Returns rms(engine's change - learner's change) / rms(learner's change)."""
        engine, learner = now[0] - before[0], now[1] - before[1]
        off, moved = _rms(engine - learner), _rms(learner)
        # Both ends of a difference carry noise: sqrt(2) floors are expected, and it grows a little with the weights.
        allowed = max(self._ratio * moved, NOISE_FLOORS * self._noise)
        if not off <= allowed:
            raise ParityError(
                f"weight version {version}: since {since} the learner's log-probs moved by {moved:.2e} nats (rms) and "
                f"the engine's differ from that by {off:.2e}, at most {allowed:.2e} is allowed "
                f"(sync.parity_change_ratio {self._ratio}, noise floor {self._noise:.2e}); a layer of the engine was "
                "probably left with old weights"
            )
        return off / moved if moved else 0.0

    def _report(self, pair: tuple[Values, Values], change_ratio: float) -> ParityReport:
        difference = pair[0] - pair[1]
        return ParityReport(float(np.abs(difference).max()), _rms(difference), change_ratio, self._noise)


def _aligned(version: int, engine: LogProbs, learner: LogProbs) -> tuple[Values, Values]:
    """Both sides as one vector each; raises ParityError for different lengths and for non-finite values."""
    lengths = [len(values) for values in engine], [len(values) for values in learner]
    if lengths[0] != lengths[1] or not sum(lengths[0]):
        raise ParityError(f"version {version}: engine scored {lengths[0]} tokens, the learner {lengths[1]}")
    pair = np.concatenate(engine).astype(np.float64), np.concatenate(learner).astype(np.float64)
    if not (np.isfinite(pair[0]).all() and np.isfinite(pair[1]).all()):
        raise ParityError(f"version {version}: a log-prob of the probe is NaN or infinite")
    return pair


def _rms(values: Values) -> float:
    return float(np.sqrt(np.mean(values**2)))
