"""Checks that a weight sync arrived: engine and learner must agree on fixed token sequences. Pure.

Two tests follow every sync. *Level*: the log-probs of the sampled tokens agree within bounds for the precision.
*Change*: the engine's log-probs moved as the learner's did, since the version before and since version 0, up to the
noise that this pair showed at version 0. One step moves log-probs by less than the level's bounds, in bfloat16 even by
less than the noise. But the movement since version 0 grows from step to step, and the noise does not.

That every parameter was written is proven in the engine itself (`rollout_workers.vllm_plugin.arrival`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.config.model import SyncConfig

NOISE_FLOORS = 3.0
"""Allowed error of a change of any size, in noise floors (rms difference at version 0)."""
RMS_NATS = {"float32": 5e-5, "bfloat16": 0.15}
Q99_NATS = {"float32": 2e-4, "bfloat16": 0.5}
"""Default bounds by dtype. Published differences of vLLM and bfloat16 trainers have rms 0.05 and maxima of 0.5."""
IGNORED_FRACTION = 100
"""One token of this many, the worst, is left out of all figures: in bfloat16 a single one may be off by nats."""

Values = NDArray[np.float64]
LogProbs = Sequence[NDArray[np.float32]]


class ParityError(RuntimeError):
    """Engine and learner disagree: rollouts would come from other weights than those being trained."""


@dataclass(frozen=True, slots=True)
class ParityBounds:
    """Bounds of a gate, in nats; `change_ratio` is relative to the learner's change."""

    rms_nats: float
    q99_nats: float
    change_ratio: float


@dataclass(frozen=True, slots=True)
class ParityReport:
    """Differences over the probe's tokens, in nats. `rms_nats` and `q99_nats` leave out the worst hundredth of them.

    `change_ratio`: rms of (engine's change - learner's change) over rms of the learner's change since version 0;
    `noise_nats`: `rms_nats` at version 0.
    """

    max_nats: float
    q99_nats: float
    rms_nats: float
    change_ratio: float
    noise_nats: float


def parity_bounds(sync: SyncConfig, dtype: str) -> ParityBounds:
    """The configured bounds, or defaults for `dtype`."""
    return ParityBounds(
        sync.parity_rms_nats or RMS_NATS[dtype], sync.parity_q99_nats or Q99_NATS[dtype], sync.parity_change_ratio
    )


class ParityGate:
    """Compares one engine with the learner at every version; raises ParityError, also for NaN and missing values."""

    def __init__(self, bounds: ParityBounds) -> None:
        self._bounds = bounds
        self._first: tuple[Values, Values] | None = None
        self._last: tuple[Values, Values] | None = None
        self._noise = 0.0

    def begin(self, engine: LogProbs, learner: LogProbs) -> ParityReport:
        """Measure the noise floor at version 0, where both hold the same weights."""
        pair = _aligned(0, engine, learner)
        self._noise = _rms(pair[0] - pair[1])
        self._first = self._last = pair
        difference = self._exceeded(pair)
        if difference is not None:
            raise ParityError(
                "before the first step engine and learner compute different log-probs for the same weights: "
                f"{difference}. With student.dtype=float32 precision is no cause; if they still differ, this vLLM "
                "computes the model otherwise than transformers: train another model. If they then agree, raise both "
                "bounds"
            )
        return self._report(pair, change_ratio=0.0)

    def check(self, version: int, engine: LogProbs, learner: LogProbs) -> ParityReport:
        """Compare after the sync of `version`, on the same sequences as `begin`."""
        if self._first is None or self._last is None:
            raise ParityError("parity was checked before the noise floor was measured at version 0")
        pair = _aligned(version, engine, learner)
        if pair[0].shape != self._first[0].shape:
            raise ParityError(f"version {version}: the probe has {pair[0].size} tokens, it had {self._first[0].size}")
        difference = self._exceeded(pair)
        if difference is not None:
            raise ParityError(
                f"weight version {version}: engine and learner differ by {difference}, and by {self._noise:.2e} nats "
                "(rms) at version 0: the engine did not get these weights"
            )
        ratio = self._check_change(version, "version 0", pair, self._first)
        self._check_change(version, "the version before", pair, self._last)
        self._last = pair
        return self._report(pair, ratio)

    def _exceeded(self, pair: tuple[Values, Values]) -> str | None:
        """The difference and its bounds if it exceeds one, else None."""
        return exceeded_bounds(pair[0] - pair[1], self._bounds)

    def _check_change(
        self, version: int, since: str, now: tuple[Values, Values], before: tuple[Values, Values]
    ) -> float:
        """Returns rms(engine's change - learner's change) / rms(learner's change)."""
        engine, learner = now[0] - before[0], now[1] - before[1]
        off, moved = _rms(engine - learner), _rms(learner)
        # Both ends of a difference carry noise: sqrt(2) floors are expected, and it grows a little with the weights.
        allowed = max(self._bounds.change_ratio * moved, NOISE_FLOORS * self._noise)
        if not off <= allowed:
            raise ParityError(
                f"weight version {version}: since {since} the learner's log-probs moved by {moved:.2e} nats (rms) and "
                f"the engine's differ from that by {off:.2e}, at most {allowed:.2e} is allowed "
                f"(sync.parity_change_ratio {self._bounds.change_ratio}, noise floor {self._noise:.2e}); a layer of "
                "the engine was probably left with old weights"
            )
        return off / moved if moved else 0.0

    def _report(self, pair: tuple[Values, Values], change_ratio: float) -> ParityReport:
        difference = pair[0] - pair[1]
        worst = float(np.abs(difference).max())
        return ParityReport(worst, _q99(difference), _rms(difference), change_ratio, self._noise)


def exceeded_bounds(difference: Values, bounds: ParityBounds) -> str | None:
    """The figures of `difference` (nats, one value a token) with their bounds if one exceeds its bound, else None."""
    rms, q99 = _rms(difference), _q99(difference)
    if rms <= bounds.rms_nats and q99 <= bounds.q99_nats:
        return None
    return (
        f"{rms:.2e} nats (rms over {difference.size} tokens; at most {bounds.rms_nats:.2e}, sync.parity_rms_nats) "
        f"and {q99:.2e} (99% of the tokens; at most {bounds.q99_nats:.2e}, sync.parity_q99_nats)"
    )


def _aligned(version: int, engine: LogProbs, learner: LogProbs) -> tuple[Values, Values]:
    """Both sides as one vector each; raises ParityError for different lengths and for non-finite values."""
    lengths = [len(values) for values in engine], [len(values) for values in learner]
    if lengths[0] != lengths[1] or not sum(lengths[0]):
        raise ParityError(f"version {version}: engine scored {lengths[0]} tokens, the learner {lengths[1]}")
    pair = np.concatenate(engine).astype(np.float64), np.concatenate(learner).astype(np.float64)
    for side, values in zip(("engine", "learner"), pair, strict=True):
        if not np.isfinite(values).all():
            when = f"weight version {version}" if version else "before the first step"
            remedy = "" if version else ": train another model"
            raise ParityError(f"{when} the {side} computes NaN or infinity for a token of the probe{remedy}")
    return pair


def _kept(values: Values) -> Values:
    """Sizes of `values` in ascending order, without the worst hundredth (none of fewer than a hundred)."""
    return np.sort(np.abs(values))[: values.size - values.size // IGNORED_FRACTION]


def _rms(values: Values) -> float:
    return float(np.sqrt(np.mean(_kept(values) ** 2)))


def _q99(values: Values) -> float:
    return float(_kept(values)[-1])
