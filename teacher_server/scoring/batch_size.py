"""Size of the next batch, from the measured speed and the number of runs that share the teacher."""

from __future__ import annotations

import time
from collections.abc import Callable

ALONE_BATCH_S = 2.0
"""Duration of a batch while one run is active: a shorter batch only reads the weights more often."""

BATCH_S = 0.5
"""Duration of a batch while several runs of one tenant are active and one of them waits: a newcomer waits for this
batch first."""

SHARED_BATCH_S = 0.15
"""Duration of a batch while several runs wait or several tenants are active: a quiet one then waits little longer than
its own batch takes."""

ACTIVE_S = 60.0
"""A run counts as active this long after its last request."""

MIN_BATCH_TOKENS = 128
"""Lower bound for slow models: a smaller batch only reads the weights more often."""


class BatchSizer:
    """Keeps the measured speed, in tokens per second, and the times of the runs' last requests."""

    def __init__(self, max_tokens: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_tokens = max_tokens
        self._clock = clock
        self._requested_at: dict[tuple[str, str], float] = {}
        self.tokens_per_s = 1000.0

    def record_request(self, tenant: str, run: str) -> None:
        """Count a run as active from now on."""
        self._requested_at.pop((tenant, run), None)  # reinserted at the end: the oldest comes first
        self._requested_at[tenant, run] = self._clock()
        self.active_runs()  # clients choose the names: none is kept longer than it counts

    def record_batch(self, tokens: int, seconds: float) -> None:
        """Update the speed with one batch."""
        if tokens and seconds > 0:
            self.tokens_per_s += 0.2 * (tokens / seconds - self.tokens_per_s)

    def active_runs(self) -> int:
        """Number of runs with a request in the last `ACTIVE_S`; forgets the others."""
        oldest_allowed = self._clock() - ACTIVE_S
        while self._requested_at and (oldest := next(iter(self._requested_at.items())))[1] < oldest_allowed:
            del self._requested_at[oldest[0]]
        return len(self._requested_at)

    def several_tenants(self) -> bool:
        """Tell if runs of several tenants are active."""
        return len({tenant for tenant, _ in self._requested_at}) > 1

    def tokens(self, waiting_runs: int) -> int:
        """Token budget of the next batch: what the measured speed computes in its duration, within the bounds."""
        several = BATCH_S if self.active_runs() > 1 else ALONE_BATCH_S
        seconds = SHARED_BATCH_S if waiting_runs > 1 or self.several_tenants() else several
        return min(self._max_tokens, max(MIN_BATCH_TOKENS, int(self.tokens_per_s * seconds)))
