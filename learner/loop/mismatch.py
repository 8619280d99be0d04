"""Bounds on the training-inference mismatch: engine against learner log-probs on the trained tokens. Pure.

`learner.loop.parity` proves on a fixed probe that a sync arrived. This covers every trained token, so it alone shows
kernels, padding or batch sizes that change what the engine computes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from common.config.model import SyncConfig

RMS, OUTSIDE = "mismatch/rms", "mismatch/outside"
"""Metrics of a step: root mean square of engine minus learner log-prob, in nats; share of tokens whose probability
ratio, learner over engine, lies outside [0.9, 1.1]."""

WARN_NATS = {"float32": 0.002, "bfloat16": 0.1}
WARN_SHARE = {"float32": 0.1, "bfloat16": 0.2}
"""In bfloat16 twice what programs that agree show: published rms 0.05 and 95% of the tokens within 0.11 nats; measured
0.054 and 6 to 8% of the tokens outside (the demo on CPU, 160 tokens a step)."""
STOP_FACTOR = 5.0
STOP_SHARE = 0.5


class MismatchError(RuntimeError):
    """The engine samples from another policy than the learner trains."""


@dataclass(frozen=True, slots=True)
class MismatchBounds:
    """Bounds above which a step is reported (`warn`) or ends the run (`stop`); None: no bound."""

    warn_nats: float | None
    stop_nats: float | None
    warn_share: float | None
    stop_share: float | None


def mismatch_bounds(sync: SyncConfig, *, dtype: str, max_staleness: int) -> MismatchBounds:
    """The configured bounds, or defaults for `dtype`. There are no defaults for rollouts that run ahead: their weights
    differ from the learner's by design.
    """
    default = max_staleness == 0
    warn_nats = sync.mismatch_warn_nats or (WARN_NATS[dtype] if default else None)
    return MismatchBounds(
        warn_nats=warn_nats,
        stop_nats=sync.mismatch_stop_nats or (STOP_FACTOR * warn_nats if default and warn_nats else None),
        warn_share=sync.mismatch_warn_share or (WARN_SHARE[dtype] if default else None),
        stop_share=sync.mismatch_stop_share or (STOP_SHARE if default else None),
    )


@dataclass
class MismatchGate:
    """Checks each step's metrics; `warned` counts the reported steps."""

    bounds: MismatchBounds
    warned: int = 0

    def check(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """A line to report if `step` exceeds a warning bound, else None. Raises MismatchError above a stop bound, and
        for NaN unless the learner skipped the step for a non-finite loss.

        Steps without mismatch metrics (log-probs at two temperatures, or cut by top-p) pass.
        """
        if RMS not in metrics:
            return None
        rms, outside = metrics[RMS], metrics[OUTSIDE]
        found = (
            f"step {step}: log-probs of engine and learner differ by {rms:.2g} nats (rms), "
            f"{outside:.1%} of tokens by more than a tenth of their probability"
        )
        if not math.isfinite(rms) and metrics.get("skipped"):
            return None
        bounds = self.bounds
        if not math.isfinite(rms) or _past(rms, bounds.stop_nats) or _past(outside, bounds.stop_share):
            raise MismatchError(
                f"{found}; the run stops at {_named(bounds.stop_nats, bounds.stop_share)} (sync.mismatch_stop_nats, "
                "sync.mismatch_stop_share): the engine samples from another policy than the one that is trained"
            )
        if _past(rms, bounds.warn_nats) or _past(outside, bounds.warn_share):
            self.warned += 1
            return f"{found}; expected at most {_named(bounds.warn_nats, bounds.warn_share)}"
        return None


def _past(value: float, bound: float | None) -> bool:
    return bound is not None and value > bound


def _named(nats: float | None, share: float | None) -> str:
    parts = [*([] if nats is None else [f"{nats:.2g} nats"]), *([] if share is None else [f"{share:.1%}"])]
    return " or ".join(parts) or "what is no number"
