"""Which worker answers next. Pure: no Ray, no clock."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

REMEMBERED_KEYS = 65_536


@dataclass
class Dispatch:
    """Least-loaded worker first, by tokens in flight; a prompt's next sample goes to the worker that holds its prefix,
    as long as that worker is not further ahead than the sample is long.

    `slots` bounds the answers in flight in one worker: what waits, waits here, and goes to whoever is free first.
    """

    slots: int
    _tokens: dict[int, int] = field(default_factory=dict)
    _answers: dict[int, int] = field(default_factory=dict)
    _holder: OrderedDict[str, int] = field(default_factory=OrderedDict)

    def join(self, worker: int) -> None:
        """`worker` takes answers from now on."""
        self._tokens[worker] = self._answers[worker] = 0

    def leave(self, worker: int) -> None:
        """`worker` takes no more; what it had in flight is forgotten here."""
        self._tokens.pop(worker, None)
        self._answers.pop(worker, None)

    @property
    def workers(self) -> tuple[int, ...]:
        """Who takes answers, in the order of joining."""
        return tuple(self._tokens)

    @property
    def in_flight(self) -> int:
        """Answers in flight, all workers together."""
        return sum(self._answers.values())

    def start(self, key: str, tokens: int) -> int | None:
        """Give an answer of at most `tokens` tokens to a worker; None where every slot is taken."""
        free = [worker for worker in self._tokens if self._answers[worker] < self.slots]
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
        if len(self._holder) > REMEMBERED_KEYS:
            self._holder.popitem(last=False)
        return chosen

    def end(self, worker: int, tokens: int) -> None:
        """An answer that `start` gave to `worker` has ended, whatever became of it."""
        if worker in self._tokens:
            self._tokens[worker] -= tokens
            self._answers[worker] -= 1
