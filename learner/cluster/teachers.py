"""The teachers of one run: its own as actors, others by address; which one scores what, and who gets weights.

A teacher of the run's own that dies is started again at the same address: scorers wait for it and hand their contexts
over again. One that takes weights (`live`, `ema`) cannot: what it had is gone. Neither can one whose node is gone: the
address was the node's.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httpx
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from common.async_utils import all_of, value_of, within
from common.config.model import Config, TeacherConfig, TeacherServerConfig
from common.protocol.routing import DEFAULT_TEACHER, RoutingScorerFactory
from common.protocol.schema import Context, ScoreMode, TeacherInfo
from common.protocol.scoring import ScorerFactory, TeacherError
from learner.cluster.placement import Placement
from learner.errors import ServiceLost
from rollout_workers.pool.failures import ACTOR_LOST, short
from teacher_server.actor import TeacherActor
from teacher_server.client import LOST_AFTER_S, TeacherClient, TeacherScorerFactory, handshake, read_key

log = logging.getLogger(__name__)

SUPPORT_MODES: dict[str, ScoreMode] = {"student": "at_ids", "teacher": "teacher_topk", "union": "union"}
"""``loss.support`` -> how a teacher is asked."""
START_TIMEOUT_S = 900.0
"""For a model to be loaded."""
METRICS_TIMEOUT_S = 2.0
WATCH_EVERY_S = 5.0
MAX_RESTARTS = 3
OWN_LOST_AFTER_S = 300.0
"""How long scorers wait for a teacher of the run's own that is being started again."""


@dataclass
class Teacher:
    """One teacher. `handle` is its actor, None for one that is reached by address."""

    name: str
    section: TeacherConfig
    handle: Any = None
    started: Any = None
    url: str = ""
    key: str | None = field(default=None, repr=False)
    info: TeacherInfo | None = None
    node: str | None = None
    restarts: int = 0

    @property
    def takes_weights(self) -> bool:
        """Whether the learner publishes to it."""
        return self.section.kind in ("live", "ema")


class Teachers:
    """`begin`, `connect`; `watch` beside every step; `handles` to stop."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._placement = Placement([])
        self.all: dict[str, Teacher] = {}

    def begin(self, placement: Placement) -> None:
        """Place the run's own teachers; `connect` waits for them."""
        self._placement = placement
        for name, section in self._config.named_teachers().items():
            if section.kind == "base":  # the learner itself
                continue
            if section.url is not None:
                key = None if section.client_key_file is None else read_key(section.client_key_file)
                self.all[name] = Teacher(name, section, url=section.url, key=key)
                continue
            whole = section.model_copy(update={"model": section.model or self._config.student.model})
            if self._config.learner.deterministic:
                whole = whole.model_copy(update={"batch_items": 1})
            # Other users of the machine reach the port too: a key of the run's own.
            teacher = Teacher(name, whole, key=secrets.token_urlsafe(32))
            self._place(teacher)
            self.all[name] = teacher

    async def connect(
        self, contexts: Mapping[str, Context], *, tokenizer_fingerprint: str, longest_tokens: int
    ) -> ScorerFactory | None:
        """Shake hands with all; the factory makes, inside a worker, what asks the right one for each row. None: the
        learner scores.

        Raises TeacherError where a teacher does not fit the run.
        """
        config = self._config
        factories: dict[str, ScorerFactory] = {}
        for teacher in self.all.values():
            section = teacher.section
            if teacher.handle is not None:
                teacher.url = await within(START_TIMEOUT_S, teacher.started)
                teacher.node = await value_of(teacher.handle.node_id.remote())
            ca_file = None if section.ca_file is None else str(section.ca_file)
            teacher.info = await self._ask_info(teacher, ca_file)
            handshake(
                teacher.info,
                tokenizer_fingerprint=tokenizer_fingerprint,
                k=config.loss.top_k,
                mode=SUPPORT_MODES[config.loss.support],
                temperature=config.loss.temperature,
                longest_tokens=longest_tokens,
            )
            factories[teacher.name] = TeacherScorerFactory(
                url=teacher.url,
                run=config.run.name,
                expected_info=teacher.info,
                contexts=tuple(contexts.values()),
                mode=SUPPORT_MODES[config.loss.support],
                temperature=config.loss.temperature,
                k=config.loss.top_k,
                timeout_s=section.request_timeout_s,
                api_key=teacher.key,
                ca_file=ca_file,
                lost_after_s=LOST_AFTER_S if teacher.handle is None else OWN_LOST_AFTER_S,
            )
        if not factories:
            return None
        return factories[DEFAULT_TEACHER] if len(factories) == 1 else RoutingScorerFactory(factories)

    @property
    def longest_tokens(self) -> int | None:
        """Context + prompt + response that every teacher can take; None where the learner scores."""
        limits = (teacher.info.max_sequence_tokens for teacher in self.all.values() if teacher.info is not None)
        return min(limits, default=None)

    @property
    def receivers(self) -> list[Teacher]:
        """Those that take the learner's weights, in the order of their ranks in the weight group."""
        return [teacher for teacher in self.all.values() if teacher.takes_weights]

    def fingerprints(self) -> dict[str, str]:
        """Name of each connected teacher -> fingerprint of its model."""
        return {name: one.info.model_fingerprint for name, one in self.all.items() if one.info is not None}

    def vocab_sizes(self) -> dict[str, int]:
        """Name of each connected teacher -> outputs of its model."""
        return {name: one.info.vocab_size for name, one in self.all.items() if one.info is not None}

    def handles(self) -> list[Any]:
        """The run's own, to be stopped with it."""
        return [teacher.handle for teacher in self.all.values() if teacher.handle is not None]

    def metrics_pages(self) -> dict[str, Callable[[], str]]:
        """Of the run's own, by name: what returns ``/metrics`` of now, and raises OSError where nobody answers."""
        return {one.name: partial(_metrics_page, one) for one in self.all.values() if one.handle is not None}

    async def save_state(self, folder: str) -> None:
        """Write what a resumed run needs of those that average."""
        averaging = [teacher for teacher in self.receivers if teacher.section.kind == "ema"]
        await all_of([one.handle.save_state.remote(f"{folder}/teacher-{one.name}.safetensors") for one in averaging])

    async def load_state(self, folder: str) -> None:
        """Go on from `save_state`."""
        averaging = [teacher for teacher in self.receivers if teacher.section.kind == "ema"]
        await all_of([one.handle.load_state.remote(f"{folder}/teacher-{one.name}.safetensors") for one in averaging])

    async def watch(self) -> None:
        """Start the run's own frozen teachers again when they die.

        Raises TeacherError where that does not help, ServiceLost for one whose weights or node are gone with it.
        """
        while True:
            await asyncio.sleep(WATCH_EVERY_S)
            for teacher in self.all.values():
                if teacher.handle is not None:
                    await self._revive(teacher)

    async def _revive(self, teacher: Teacher) -> None:
        try:
            await value_of(teacher.handle.node_id.remote())
            return
        except ACTOR_LOST as error:
            died = short(error)
        if teacher.takes_weights:
            raise ServiceLost(f"the run's own teacher {teacher.name!r} died, and its weights with it: {died}")
        if teacher.restarts == MAX_RESTARTS:
            raise TeacherError(
                f"the run's own teacher {teacher.name!r} died after it was started {MAX_RESTARTS} times again: {died}"
            )
        log.warning("the run's own teacher %r died and is started again: %s", teacher.name, died)
        teacher.restarts += 1
        port = int(teacher.url.rpartition(":")[2])
        teacher.section = teacher.section.model_copy(update={"port": port})
        self._place(teacher)
        try:
            url = await within(START_TIMEOUT_S, teacher.started)
        except (ray.exceptions.ActorUnschedulableError, *ACTOR_LOST, TimeoutError) as error:
            why = short(error) if str(error) else f"it was not up within {START_TIMEOUT_S:.0f} s"
            raise ServiceLost(
                f"the run's own teacher {teacher.name!r} died and cannot be started again where it was: {why}"
            ) from error
        if url != teacher.url:
            raise ServiceLost(
                f"the run's own teacher {teacher.name!r} died and came up at {url}, where no scorer asks for it; "
                f"it was at {teacher.url}"
            )

    def _place(self, teacher: Teacher) -> None:
        options = self._placement.options(f"teacher {teacher.name}")
        if teacher.node is not None and "scheduling_strategy" not in options:  # its address must stay what scorers know
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(teacher.node, soft=False)
        actor = ray.remote(TeacherActor).options(**options)
        teacher.handle = actor.remote(
            TeacherServerConfig(teacher=teacher.section), teacher.key, self._config.sync_in_run
        )
        teacher.started = teacher.handle.start.remote()

    async def _ask_info(self, teacher: Teacher, ca_file: str | None) -> TeacherInfo:
        timeout_s = teacher.section.request_timeout_s
        client = TeacherClient(teacher.url, self._config.run.name, timeout_s, teacher.key, ca_file=ca_file)
        try:
            return await client.info()
        finally:
            await client.close()


def _metrics_page(teacher: Teacher) -> str:
    header = {"Authorization": f"Bearer {teacher.key}"}
    try:
        reply = httpx.get(f"{teacher.url}/metrics", headers=header, timeout=METRICS_TIMEOUT_S, trust_env=False)
        return reply.raise_for_status().text
    except httpx.HTTPError as error:
        raise OSError(f"{teacher.url}: {error}") from error
