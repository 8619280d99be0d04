"""The rollout workers of a run: which are alive, which take answers, and what happens when one dies.

A worker that dies, or whose engine does, is replaced, and its answers are made again by another worker (same seed, same
weights). A replacement starts with the initial weights, so it joins only after the loop has published the current ones
to it: at the next step boundary, or at once if no other worker is left.

Extra workers, beyond those that the run starts with, join whenever the cluster has room and may leave again.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import ray

from common.async_utils import value_of
from rollout_workers.pool.dispatch import Dispatch
from rollout_workers.pool.failures import ACTOR_LOST, short

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 4
"""Workers that one answer may kill before the run stops: then the answer is what kills them."""
HEALTH_EVERY_S = 10.0
HEALTH_TIMEOUT_S = 300.0
"""An engine answers a health check between two forward passes, possibly after compiling one: minutes at most. A longer
silence counts as a hang."""
START_TIMEOUT_S = 900.0
"""Limit for a worker to find a node and load its model."""
MAX_EXTRA_STARTS = 3
"""Extra workers of one slot that may die in a row while they start; then the slot stays empty."""


class PoolError(RuntimeError):
    """No rollout worker is left, or workers die faster than it makes sense to replace them."""


@dataclass(frozen=True, slots=True, eq=False)
class Worker:
    """A rollout worker. `number` is never used twice; a replacement takes the `slot` of the worker that died."""

    number: int
    slot: int
    handle: Any
    extra: bool = False
    """Beyond the workers that the run started with."""


class WorkerPool:
    """Keeps workers alive and gives each at most `max_in_flight` answers to make at a time.

    Used on one event loop. `max_restarts` bounds replacements over the pool's life; a worker whose engine is not up
    after `start_timeout_s` counts as dead. Extra workers (`invite`) cost no restart.
    """

    def __init__(self, *, max_in_flight: int, max_restarts: int, start_timeout_s: float = START_TIMEOUT_S) -> None:
        self._make: Callable[[int, int], Any] | None = None
        self._max_restarts = max_restarts
        self._start_timeout_s = start_timeout_s
        self._dispatch = Dispatch(max_in_flight)
        self._workers: dict[int, Worker] = {}
        self._waiting: dict[int, Worker] = {}
        self._next_number = 0
        self._queue: deque[tuple[str, int, asyncio.Future[int]]] = deque()
        self._changed = asyncio.Event()
        self._failure: PoolError | None = None
        self._starting: set[asyncio.Task[None]] = set()
        self._unplaced: set[int] = set()
        self._died_starting: Counter[int] = Counter()
        self.nodes: dict[int, str] = {}
        """Worker number -> Ray's id of its node, for extra workers that are placed."""
        self.failures = 0
        self.restarts = 0
        self.reissued = 0

    # --- rollouts ---------------------------------------------------------------------------------------------------

    async def run(self, key: str, tokens: int, call: Callable[[Any], tuple[Any, Any]]) -> tuple[Any, Any]:
        """Have a worker do `call`, which takes its handle and returns two object references.

        Waits for a free worker, then for the first reference. Returns (value of the first, the second reference).
        `key` names the prompt, whose prefix a worker may have cached; `tokens` is the most that the work may cost. If
        the worker dies, another one does the work. Cancelling the caller cancels the work.
        """
        for _ in range(MAX_ATTEMPTS):
            worker = await self._take(key, tokens)
            try:
                awaited, passed = call(worker.handle)
                try:
                    return await value_of(awaited), passed
                except asyncio.CancelledError:
                    ray.cancel(awaited)
                    raise
            except ACTOR_LOST as error:
                self.lose(worker, short(error))
                self.reissued += 1
            finally:
                self._dispatch.end(worker.number, tokens)
                self._give_turns()
        raise PoolError(f"{MAX_ATTEMPTS} rollout workers died while they worked on {key!r}, one after the other")

    async def _take(self, key: str, tokens: int) -> Worker:
        """Wait for a worker with room; first come, first served."""
        self._raise_failure()
        number = None if self._queue else self._dispatch.start(key, tokens)
        if number is None:
            turn: asyncio.Future[int] = asyncio.get_running_loop().create_future()
            self._queue.append((key, tokens, turn))
            try:
                number = await turn
            except asyncio.CancelledError:
                if not turn.cancelled() and turn.exception() is None:  # a worker was assigned already
                    self._dispatch.end(turn.result(), tokens)
                    self._give_turns()
                raise
        return self._workers.get(number) or await self._take(key, tokens)  # it may have died meanwhile

    def _give_turns(self) -> None:
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

    # --- members ----------------------------------------------------------------------------------------------------

    @property
    def members(self) -> list[Worker]:
        """Workers that take answers, in the order of joining."""
        return [self._workers[number] for number in self._dispatch.workers]

    @property
    def ready(self) -> list[Worker]:
        """Replacements and extra workers whose engines are up and wait for the current weights."""
        return list(self._waiting.values())

    async def start(self, make: Callable[[int, int], Any], count: int) -> Any:
        """Place `count` workers, wait for their engines and admit them; returns the first one's `ready` value.

        `make` places a worker's actor, given its number and slot. Raises the error of an engine that cannot start.
        """
        self._make = make
        workers = [self._place(slot) for slot in range(count)]
        infos = await asyncio.gather(*(value_of(worker.handle.ready.remote()) for worker in workers))
        for worker in workers:
            self.admit(worker)
        return infos[0]

    def invite(self, slots: Iterable[int]) -> None:
        """Ask for an extra worker in each of `slots`, which no other worker has.

        Ray places it when the cluster has room (until then an autoscaler sees the demand); it is `ready` when its
        engine is up. A dead one is asked for again, unless its engine cannot start or `MAX_EXTRA_STARTS` in a row died
        while they started.
        """
        for slot in slots:
            self._start_in_background(self._place(slot, extra=True))

    def admit(self, worker: Worker) -> None:
        """Give answers to `worker` from now on; it must hold the current weights."""
        self._waiting.pop(worker.number, None)
        self._dispatch.join(worker.number)
        self._changed.set()
        self._give_turns()

    def lose(self, worker: Worker, why: str, *, for_good: bool = False) -> None:
        """Remove `worker` and start a replacement; does nothing for one that was removed already.

        Once `max_restarts` are spent, every caller that needs a worker gets a PoolError. An extra worker costs no
        restart; with `for_good` it has no replacement.
        """
        if self._workers.pop(worker.number, None) is None:
            return
        self._dispatch.leave(worker.number)
        self._waiting.pop(worker.number, None)
        self._unplaced.discard(worker.number)
        self.nodes.pop(worker.number, None)
        ray.kill(worker.handle)  # its calls fail, so that their callers go to another worker
        self.failures += 1
        log.warning("rollout worker %d is lost: %s", worker.number, why)
        self._changed.set()  # it may have been the last member
        if worker.extra:
            if not for_good:
                self.invite([worker.slot])
            return
        if self.restarts >= self._max_restarts:
            self._failure = PoolError(
                f"rollout worker {worker.number} is lost ({why}), and {self.restarts} were replaced already, as many "
                "as rollout.max_restarts allows"
            )
            self._give_turns()
            return
        self.restarts += 1
        replacement = self._place(worker.slot)
        log.warning("rollout worker %d starts in its place", replacement.number)
        self._start_in_background(replacement)

    async def next_ready(self) -> None:
        """Wait until a replacement's engine is up. Raises PoolError if none will be."""
        while not self._waiting:
            self._raise_failure()
            if not self._starting:
                raise PoolError("no rollout worker is left, and none is being started")
            await self._change()

    async def only_replacements(self) -> None:
        """Wait until no member is left and a replacement is ready."""
        while self._dispatch.workers or not self._waiting:
            await self._change()

    async def watch(self) -> None:
        """Check health every `HEALTH_EVERY_S`, until cancelled."""
        while True:
            await asyncio.sleep(HEALTH_EVERY_S)
            await self.check_health()

    async def check_health(self) -> None:
        """Ask every worker whose engine was up for a sign of life; remove those that give none in time."""

        async def check(worker: Worker) -> None:
            try:
                await asyncio.wait_for(value_of(worker.handle.check_health.remote()), HEALTH_TIMEOUT_S)
            except TimeoutError:
                self.lose(worker, f"its engine hangs: no answer to a health check within {HEALTH_TIMEOUT_S:g} s")
            except ray.exceptions.RayError as error:
                self.lose(worker, short(error))

        await asyncio.gather(*(check(worker) for worker in (*self.members, *self.ready)))

    def handles(self) -> list[Any]:
        """Actors that run and must be stopped with the run."""
        return [worker.handle for number, worker in self._workers.items() if number not in self._unplaced]

    def close(self) -> None:
        """Start no more workers and forget all; the caller stops the running actors (`handles`, taken before)."""
        for task in list(self._starting):
            task.cancel()
        for number, worker in self._workers.items():
            self._dispatch.leave(number)
            if number in self._unplaced:  # it has no process that could stop by itself
                ray.kill(worker.handle)
        self._workers.clear()
        self._waiting.clear()
        self._unplaced.clear()

    def _place(self, slot: int, *, extra: bool = False) -> Worker:
        assert self._make is not None
        number, self._next_number = self._next_number, self._next_number + 1
        worker = self._workers[number] = Worker(number, slot, self._make(number, slot), extra)
        if extra:
            self._unplaced.add(number)
        return worker

    def _start_in_background(self, worker: Worker) -> None:
        """Add `worker` to `ready` as soon as its engine is up."""

        async def start() -> None:
            try:
                if worker.extra:
                    self.nodes[worker.number] = await value_of(worker.handle.node.remote())  # waits for room
                    self._unplaced.discard(worker.number)
                    log.info("extra rollout worker %d is placed", worker.number)
                await asyncio.wait_for(value_of(worker.handle.ready.remote()), self._start_timeout_s)
                self._waiting[worker.number] = worker
                del self._died_starting[worker.slot]
            except TimeoutError:
                self.lose(
                    worker,
                    f"its engine was not up within {self._start_timeout_s:g} s: no node has room for it, or the "
                    "model takes longer to load",
                    for_good=True,
                )
            except ACTOR_LOST as error:
                self._died_starting[worker.slot] += 1
                self.lose(worker, short(error), for_good=self._died_starting[worker.slot] >= MAX_EXTRA_STARTS)
            except ray.exceptions.RayError as error:
                self.lose(worker, short(error), for_good=True)
            finally:
                self._starting.discard(task)
                self._changed.set()

        task = asyncio.get_running_loop().create_task(start(), name=f"start-worker-{worker.number}")
        self._starting.add(task)

    async def _change(self) -> None:
        """Wait until a worker joins or leaves."""
        changed = self._changed
        await changed.wait()
        if self._changed is changed:
            self._changed = asyncio.Event()  # waiters of this event look again; later ones wait for the next

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
