"""Chooses the worker for the next answer. Pure: no Ray, no clock."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

MAX_REMEMBERED_KEYS = 65_536


@dataclass
class Dispatch:
    """Chooses the worker with the fewest tokens in flight, but prefers the worker that has the prompt's prefix cached,
    as long as that worker is ahead by no more tokens than the answer may cost.

    No worker gets more than `max_in_flight` answers at a time; further answers wait with the caller.
    """

    max_in_flight: int
    _tokens: dict[int, int] = field(default_factory=dict)
    _answers: dict[int, int] = field(default_factory=dict)
    _holder: OrderedDict[str, int] = field(default_factory=OrderedDict)

    def join(self, worker: int) -> None:
        """Give answers to `worker` from now on."""
        self._tokens[worker] = self._answers[worker] = 0

    def leave(self, worker: int) -> None:
        """Give no more answers to `worker` and forget those in flight."""
        self._tokens.pop(worker, None)
        self._answers.pop(worker, None)

    @property
    def workers(self) -> tuple[int, ...]:
        """Workers that take answers, in the order of joining."""
        return tuple(self._tokens)

    @property
    def in_flight(self) -> int:
        """Answers in flight over all workers."""
        return sum(self._answers.values())

    def start(self, key: str, tokens: int) -> int | None:
        """The worker for an answer of at most `tokens` tokens to prompt `key`; None if all workers are full."""
        free = [worker for worker in self._tokens if self._answers[worker] < self.max_in_flight]
        if not free:
            return None
        least = min(free, key=lambda worker: self._tokens[worker])
        holder = self._holder.get(key)
        chosen = holder if holder in free and self._tokens[holder] <= self._tokens[least] + tokens else least
        assert chosen is not None
        self._tokens[chosen] += tokens
        self._answers[chosen] += 1
        self._holder[key] = chosen
        self._holder.move_to_end(key)
        if len(self._holder) > MAX_REMEMBERED_KEYS:
            self._holder.popitem(last=False)
        return chosen

    def end(self, worker: int, tokens: int) -> None:
        """Count an answer that `start` gave to `worker` as ended, whatever its outcome."""
        if worker in self._tokens:
            self._tokens[worker] -= tokens
            self._answers[worker] -= 1
