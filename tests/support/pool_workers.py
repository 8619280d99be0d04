"""Actors that stand in for rollout workers in tests of the pool: no engine."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray


def die_once(trap: Path) -> None:
    """End the process if the file is still there: of those that find it only the one that takes it away."""
    try:
        trap.unlink()
    except FileNotFoundError:
        return
    os._exit(1)


@dataclass(frozen=True)
class Asked:
    """A request to `Echo`: its duration, and what happens at its end."""

    seconds: float = 0.0
    trap: str | None = None
    error: str | None = None


class Echo:
    """Stands in for a worker: answers with its number, dies when it is told to."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.seen = {"begun": 0, "cancelled": 0, "running": 0}
        self.hangs = False

    @ray.method(concurrency_group="control")
    async def counts(self) -> dict[str, int]:
        return self.seen

    @ray.method(num_returns=2)
    async def rollout(self, asked: Asked) -> tuple[int, bytes]:
        self.seen["begun"] += 1
        self.seen["running"] += 1
        try:
            await asyncio.sleep(asked.seconds)
        except asyncio.CancelledError:
            self.seen["cancelled"] += 1
            raise
        finally:
            self.seen["running"] -= 1
        if asked.trap is not None:
            die_once(Path(asked.trap))
        if asked.error is not None:
            raise LookupError(asked.error)
        return self.number, b"item of %d" % self.number * 50_000  # too large for the reply itself

    async def node(self) -> str:
        return str(ray.get_runtime_context().get_node_id())

    async def ready(self) -> str:
        return f"worker {self.number}"

    async def check_health(self) -> None:
        if self.hangs:
            await asyncio.sleep(3600)

    async def hang(self) -> None:
        self.hangs = True

    async def work(self, seconds: float, dies: str | None = None) -> tuple[int, str]:
        """Returns its number; `dies` is the path of a file: the first that finds it takes it away and dies."""
        await asyncio.sleep(seconds)
        if dies is not None:
            die_once(Path(dies))
        return self.number, "item"

    async def deadly(self) -> tuple[int, str]:
        os._exit(1)


class NeverUp:
    """A replacement that finds no node, or never finishes loading."""

    async def ready(self) -> None:
        await asyncio.sleep(3600)


class NotHere:
    """A worker whose engine cannot start on its node."""

    async def node(self) -> str:
        return "here"

    async def ready(self) -> None:
        raise RuntimeError("the model does not fit")


class DiesStarting:
    """A worker whose process ends while its engine starts: killed for its memory, say."""

    async def node(self) -> str:
        return "here"

    async def ready(self) -> None:
        os._exit(1)


def call(*arguments: Any) -> Any:
    return lambda handle: tuple(handle.work.options(num_returns=2).remote(*arguments))


class Maker:
    """Makes the actors of a pool; a test changes `kind` or `options` for those to come."""

    def __init__(self) -> None:
        self.kind: type = Echo
        self.options: dict[str, Any] = {}

    def __call__(self, number: int, slot: int) -> Any:
        if self.kind is not Echo:
            return ray.remote(self.kind).options(num_cpus=0, **self.options).remote()
        from rollout_workers.actor import GROUPS  # not at the top: every actor would import the module

        actor = ray.remote(concurrency_groups=GROUPS)(Echo)
        return actor.options(num_cpus=0, max_concurrency=8, **self.options).remote(number)
