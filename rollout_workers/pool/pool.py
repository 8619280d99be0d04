"""The rollout workers of a run: who is alive, who answers, who comes, and what happens when one is lost.

A worker that dies, or whose engine does, is replaced; what it was answering is answered again by another (same seed,
same weights). Its replacement starts with the initial weights, so it takes part only when the loop has published the
current ones to it: at the next step boundary, or at once where nobody else is left.

So do workers beyond those that the run began with, which come whenever the cluster has room for them and may go again.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import ray

from common.async_utils import value_of
from rollout_workers.pool.dispatch import Dispatch
from rollout_workers.pool.failures import ACTOR_LOST, short
from rollout_workers.pool.line import Answer, Line

log = logging.getLogger(__name__)

ATTEMPTS = 4
"""Workers that one answer may cost before the run stops: it is the answer then that kills them."""
HEALTH_EVERY_S = 10.0
HEALTH_TIMEOUT_S = 300.0
"""An engine answers a health check between two forward passes, and behind what it may have to compile for one: minutes
at most. One that says nothing for so long hangs, and is lost."""
START_TIMEOUT_S = 900.0
"""For a place to be free and a model to be loaded."""
EXTRA_STARTS = 3
"""Extra workers in one seat that may die one after the other before their engines are up; then the seat stays empty."""


class PoolError(RuntimeError):
    """No rollout worker is left, or workers die faster than it makes sense to replace them."""


@dataclass(frozen=True, slots=True, eq=False)
class Worker:
    """A rollout worker: its number (never used twice), its seat (a replacement takes that of the lost one), its
    actor.
    """

    number: int
    seat: int
    handle: Any
    extra: bool = False
    """Beyond those that the run began with."""
    line: Line = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "line", Line(self.handle))


class WorkerPool:
    """Keeps workers alive and gives them answers to make, at most `slots` at a time to each.

    Used on one event loop. `max_restarts` bounds replacements over the pool's life; one whose engine is not up after
    `start_timeout_s` is lost as well. Extra workers (`invite`) cost none.
    """

    def __init__(self, *, slots: int, max_restarts: int, start_timeout_s: float = START_TIMEOUT_S) -> None:
        self._make: Callable[[int, int], Any] | None = None
        self._max_restarts = max_restarts
        self._start_timeout_s = start_timeout_s
        self._dispatch = Dispatch(slots)
        self._workers: dict[int, Worker] = {}
        self._waiting: dict[int, Worker] = {}
        self._numbers = 0
        self._queue: deque[tuple[str, int, asyncio.Future[int]]] = deque()
        self._changed = asyncio.Event()
        self._failure: PoolError | None = None
        self._starting: set[asyncio.Task[None]] = set()
        self._unplaced: set[int] = set()
        self._died_starting: Counter[int] = Counter()
        self.nodes: dict[int, str] = {}
        """Of the extra workers that are placed: where, as Ray names it."""
        self.losses = 0
        self.restarts = 0
        self.reissued = 0

    # --- members ----------------------------------------------------------------------------------------------------

    @property
    def members(self) -> list[Worker]:
        """Who answers, in the order of joining."""
        return [self._workers[number] for number in self._dispatch.workers]

    @property
    def ready(self) -> list[Worker]:
        """Replacements and extra workers whose engines are up and wait for the current weights."""
        return list(self._waiting.values())

    async def start(self, make: Callable[[int, int], Any], count: int) -> Any:
        """Place `count` workers, wait until their engines are up and admit them; returns what the first says of itself.

        `make` places the actor of a worker, given its number and seat. Raises what an engine that cannot start raised.
        """
        self._make = make
        workers = [self._place(seat) for seat in range(count)]
        infos = await asyncio.gather(*(value_of(worker.handle.ready.remote()) for worker in workers))
        for worker in workers:
            self.admit(worker)
        return infos[0]

    def invite(self, seats: Iterable[int]) -> None:
        """Ask for an extra worker in each of `seats`, which are nobody else's.

        It is placed when the cluster has room, however late (until then it is demand, as an autoscaler sees it), and
        `ready` when its engine is up. One that is lost is asked for again, but not one whose engine cannot start, nor
        after `EXTRA_STARTS` in a row that died while they started.
        """
        for seat in seats:
            self._begin(self._place(seat, extra=True))

    def admit(self, worker: Worker) -> None:
        """`worker` holds the current weights and answers from now on."""
        self._waiting.pop(worker.number, None)
        self._dispatch.join(worker.number)
        self._changed.set()
        self._give_turns()

    def lose(self, worker: Worker, why: str, *, for_good: bool = False) -> None:
        """Give up on `worker` and start a replacement; does nothing for one that was lost already.

        When `max_restarts` are spent, whoever needs a worker gets a PoolError. An extra worker costs none, and has no
        successor where it is lost `for_good`.
        """
        if self._workers.pop(worker.number, None) is None:
            return
        self._dispatch.leave(worker.number)
        self._waiting.pop(worker.number, None)
        self._unplaced.discard(worker.number)
        self.nodes.pop(worker.number, None)
        ray.kill(worker.handle)  # which fails its calls: who waits for their answers goes to another worker
        self.losses += 1
        log.warning("rollout worker %d is lost: %s", worker.number, why)
        self._changed.set()  # it may have been the last that answered
        if worker.extra:
            if not for_good:
                self.invite([worker.seat])
            return
        if self.restarts >= self._max_restarts:
            self._failure = PoolError(
                f"rollout worker {worker.number} is lost ({why}), and {self.restarts} were replaced already, as many "
                "as rollout.max_restarts allows"
            )
            self._give_turns()
            return
        self.restarts += 1
        replacement = self._place(worker.seat)
        log.warning("rollout worker %d is started in its place", replacement.number)
        self._begin(replacement)

    async def next_ready(self) -> None:
        """Wait until the engine of one that is not a member is up. Raises PoolError where none will be."""
        while not self._waiting:
            self._raise_failure()
            if not self._starting:
                raise PoolError("no rollout worker is left, and none is being started")
            await self._change()

    async def settled(self) -> None:
        """Wait until nobody is being started any more. Raises PoolError where somebody who is lost is not replaced."""
        while self._starting:
            await self._change()
        self._raise_failure()

    async def only_replacements(self) -> None:
        """Wait until nobody answers any more, but a replacement could."""
        while self._dispatch.workers or not self._waiting:
            await self._change()

    async def check_health(self) -> None:
        """Ask every worker whose engine was up whether it lives; lose those that do not say so in time."""

        async def check(worker: Worker) -> None:
            try:
                await asyncio.wait_for(value_of(worker.handle.check_health.remote()), HEALTH_TIMEOUT_S)
            except TimeoutError:
                self.lose(worker, f"its engine hangs: no answer to a health check within {HEALTH_TIMEOUT_S:g} s")
            except ray.exceptions.RayError as error:
                self.lose(worker, short(error))

        await asyncio.gather(*(check(worker) for worker in (*self.members, *self.ready)))

    async def watch(self) -> None:
        """Check health for ever."""
        while True:
            await asyncio.sleep(HEALTH_EVERY_S)
            await self.check_health()

    def handles(self) -> list[Any]:
        """Every actor that runs and was not given up, to be stopped with the run."""
        return [worker.handle for number, worker in self._workers.items() if number not in self._unplaced]

    def close(self) -> None:
        """Start nobody any more and forget everybody; the caller stops the actors that run (`handles`)."""
        for task in list(self._starting):
            task.cancel()
        for number, worker in self._workers.items():
            self._dispatch.leave(number)
            worker.line.close()
            if number in self._unplaced:  # it could not be asked to stop
                ray.kill(worker.handle)
        self._workers.clear()
        self._waiting.clear()
        self._unplaced.clear()

    def _place(self, seat: int, *, extra: bool = False) -> Worker:
        assert self._make is not None
        worker = Worker(self._numbers, seat, self._make(self._numbers, seat), extra)
        self._numbers += 1
        self._workers[worker.number] = worker
        if extra:
            self._unplaced.add(worker.number)
        return worker

    def _begin(self, worker: Worker) -> None:
        """Have `worker` wait for the current weights as soon as its engine is up."""

        async def start() -> None:
            try:
                if worker.extra:
                    self.nodes[worker.number] = await value_of(worker.handle.node.remote())  # once there is room
                    self._unplaced.discard(worker.number)
                    log.info("extra rollout worker %d is placed", worker.number)
                await asyncio.wait_for(value_of(worker.handle.ready.remote()), self._start_timeout_s)
                self._waiting[worker.number] = worker
                del self._died_starting[worker.seat]
            except TimeoutError:
                self.lose(
                    worker,
                    f"its engine was not up within {self._start_timeout_s:g} s: no node has a place for it, or the "
                    "model takes longer to load",
                    for_good=True,
                )
            except ACTOR_LOST as error:
                self._died_starting[worker.seat] += 1
                self.lose(worker, short(error), for_good=self._died_starting[worker.seat] >= EXTRA_STARTS)
            except ray.exceptions.RayError as error:
                self.lose(worker, short(error), for_good=True)
            finally:
                self._starting.discard(task)
                self._changed.set()

        task = asyncio.get_running_loop().create_task(start(), name=f"start-worker-{worker.number}")
        self._starting.add(task)

    # --- work -------------------------------------------------------------------------------------------------------

    async def order(self, key: str, tokens: int, sample: Any, *, scored: bool) -> Answer:
        """Have a worker answer `sample`: (summary, reference to the item). Orders share calls (`pool.line`).

        `key` names the prompt (its prefix may be cached), `tokens` is the most it may cost. A worker that is lost
        meanwhile costs another attempt, by another worker.
        """
        return await self._attempt(key, tokens, lambda worker: worker.line.order(sample, scored=scored))

    async def run(self, key: str, tokens: int, call: Callable[[Any], tuple[Any, Any]]) -> tuple[Any, Any]:
        """Have a worker do `call`, which gets its handle and returns (reference to wait for, reference to pass on).

        Returns (value of the first, the second); the rest as for `order`.
        """

        async def called(worker: Worker) -> tuple[Any, Any]:
            awaited, passed = call(worker.handle)
            try:
                return await value_of(awaited), passed
            except asyncio.CancelledError:
                ray.cancel(awaited)
                raise

        return await self._attempt(key, tokens, called)

    async def _attempt(
        self, key: str, tokens: int, work: Callable[[Worker], Awaitable[tuple[Any, Any]]]
    ) -> tuple[Any, Any]:
        for _ in range(ATTEMPTS):
            worker = await self._take(key, tokens)
            try:
                return await work(worker)
            except ACTOR_LOST as error:
                self.lose(worker, short(error))
                self.reissued += 1
            finally:
                self._dispatch.end(worker.number, tokens)
                self._give_turns()
        raise PoolError(f"{ATTEMPTS} rollout workers died while they worked on {key!r}, one after the other")

    async def _take(self, key: str, tokens: int) -> Worker:
        self._raise_failure()
        number = None if self._queue else self._dispatch.start(key, tokens)
        if number is None:
            turn: asyncio.Future[int] = asyncio.get_running_loop().create_future()
            self._queue.append((key, tokens, turn))
            try:
                number = await turn
            except asyncio.CancelledError:
                if not turn.cancelled() and turn.exception() is None:  # his turn had come
                    self._dispatch.end(turn.result(), tokens)
                    self._give_turns()
                raise
        return self._workers.get(number) or await self._take(key, tokens)  # it may have been lost meanwhile

    def _give_turns(self) -> None:
        """Room goes to those that wait, first come, first served."""
        while self._queue:
            key, tokens, turn = self._queue[0]
            if turn.done():  # cancelled
                self._queue.popleft()
            elif self._failure is not None:
                self._queue.popleft()
                turn.set_exception(self._failure)
            elif (number := self._dispatch.start(key, tokens)) is not None:
                self._queue.popleft()
                turn.set_result(number)
            else:
                return

    async def _change(self) -> None:
        """Wait until somebody comes or leaves."""
        changed = self._changed
        await changed.wait()
        if self._changed is changed:
            self._changed = asyncio.Event()  # every waiter looks again, new ones wait for what comes next

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
