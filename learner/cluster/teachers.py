"""The teachers of one run: local ones as actors, remote ones by address.

A local teacher that dies is started again at the same address; scorers wait for it and upload their contexts again.
That cannot work for a teacher that receives weights (`live`, `ema`), whose weights are gone, nor for one whose node is
gone, because the address was the node's.
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
from common.config.model import Config, TeacherConfig
from common.protocol.schema import Context, ScoreMode, TeacherInfo
from common.protocol.scoring import DEFAULT_TEACHER, RoutingScorerFactory, ScorerFactory, TeacherError
from learner.cluster.placement import Placement
from learner.errors import ServiceLost
from rollout_workers.pool.failures import ACTOR_LOST, short
from teacher_server.actor import TeacherActor, ask_endpoint
from teacher_server.client import LOST_AFTER_S, TeacherClient, TeacherScorerFactory, handshake, read_key

log = logging.getLogger(__name__)

SUPPORT_MODES: dict[str, ScoreMode] = {"student": "at_ids", "teacher": "teacher_topk", "union": "union"}
"""``loss.support`` -> scoring mode of the request."""
START_TIMEOUT_S = 900.0
"""Time limit for loading a model."""
FIRST_ANSWER_S = 8.0
"""Time limit for the first answer of a teacher that the run does not start."""
METRICS_TIMEOUT_S = 2.0
WATCH_EVERY_S = 5.0
MAX_RESTARTS = 3
LOCAL_LOST_AFTER_S = 300.0
"""Time that scorers wait for a local teacher while it restarts."""


@dataclass
class Teacher:
    """One teacher. `handle` is its actor; None for a remote teacher."""

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
        """True if the learner publishes weights to this teacher."""
        return self.section.kind in ("live", "ema")


class Teachers:
    """Starts the teachers (`begin`), connects to them (`connect`), and restarts dead ones (`watch`)."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._placement = Placement([])
        self.all: dict[str, Teacher] = {}

    def begin(self, placement: Placement) -> None:
        """Place the local teachers; `connect` waits for them."""
        self._placement = placement
        for name, section in self._config.named_teachers().items():
            if section.kind == "base":  # the learner itself
                continue
            if section.url is not None:
                key = None if section.client_key_file is None else read_key(section.client_key_file)
                self.all[name] = Teacher(name, section, url=section.url, key=key)
                continue
            local = section.model_copy(update={"model": section.model or self._config.student.model})
            if self._config.learner.deterministic:
                local = local.model_copy(update={"batch_items": 1})
            # Other users of the machine can reach the port, so each run makes a key.
            teacher = Teacher(name, local, key=secrets.token_urlsafe(32))
            self._place(teacher)
            self.all[name] = teacher

    async def connect(
        self,
        contexts: Mapping[str, Context],
        *,
        tokenizer_fingerprint: str,
        added_tokens: Mapping[int, str],
        longest_tokens: int,
    ) -> ScorerFactory | None:
        """Shake hands with all teachers. The returned factory makes, inside a worker, the scorer that asks the right
        teacher for each row; None if the learner scores (``teacher.kind: base``).

        Raises TeacherError for a teacher that does not fit the run.
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
                added_tokens=added_tokens,
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
                lost_after_s=LOST_AFTER_S if teacher.handle is None else LOCAL_LOST_AFTER_S,
            )
        if not factories:
            return None
        return factories[DEFAULT_TEACHER] if len(factories) == 1 else RoutingScorerFactory(factories)

    @property
    def longest_tokens(self) -> int | None:
        """Longest context + prompt + response that every teacher takes; None if the learner scores."""
        limits = (teacher.info.max_sequence_tokens for teacher in self.all.values() if teacher.info is not None)
        return min(limits, default=None)

    @property
    def receivers(self) -> list[Teacher]:
        """Teachers that receive the learner's weights, in rank order."""
        return [teacher for teacher in self.all.values() if teacher.takes_weights]

    def fingerprints(self) -> dict[str, str]:
        """Teacher's name -> fingerprint of its model."""
        return {name: one.info.model_fingerprint for name, one in self.all.items() if one.info is not None}

    def vocab_sizes(self) -> dict[str, int]:
        """Teacher's name -> number of outputs of its model."""
        return {name: one.info.vocab_size for name, one in self.all.items() if one.info is not None}

    def handles(self) -> list[Any]:
        """Actors of the local teachers, to be stopped with the run."""
        return [teacher.handle for teacher in self.all.values() if teacher.handle is not None]

    def metrics_pages(self) -> dict[str, Callable[[], str]]:
        """Local teacher's name -> function that returns its ``/metrics`` page; OSError without an answer."""
        return {one.name: partial(_metrics_page, one) for one in self.all.values() if one.handle is not None}

    async def save_state(self, folder: str) -> None:
        """Write the weights of teachers that hold others than the learner's."""
        await all_of([one.handle.save_state.remote(f"{folder}/teacher-{one.name}.safetensors") for one in self._apart])

    async def load_state(self, folder: str) -> None:
        """Load what `save_state` wrote."""
        await all_of([one.handle.load_state.remote(f"{folder}/teacher-{one.name}.safetensors") for one in self._apart])

    @property
    def _apart(self) -> list[Teacher]:
        """Receivers whose weights are not the last published version, which a resumed learner sends again."""
        return [one for one in self.receivers if one.section.kind == "ema" or one.section.refresh_every > 1]

    async def watch(self) -> None:
        """Restart local frozen teachers that die; runs until cancelled.

        Raises TeacherError after `MAX_RESTARTS`, ServiceLost for a teacher whose weights or node are gone.
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
            raise ServiceLost(f"local teacher {teacher.name!r} died, and its weights with it: {died}")
        if teacher.restarts == MAX_RESTARTS:
            raise TeacherError(f"local teacher {teacher.name!r} died after {MAX_RESTARTS} restarts: {died}")
        log.warning("local teacher %r died and is started again: %s", teacher.name, died)
        teacher.restarts += 1
        port = int(teacher.url.rpartition(":")[2])
        teacher.section = teacher.section.model_copy(update={"port": port})
        self._place(teacher)
        try:
            url = await within(START_TIMEOUT_S, teacher.started)
        except (ray.exceptions.ActorUnschedulableError, *ACTOR_LOST, TimeoutError) as error:
            why = short(error) if str(error) else f"it was not up within {START_TIMEOUT_S:.0f} s"
            raise ServiceLost(
                f"local teacher {teacher.name!r} died and cannot be started again on its node: {why}"
            ) from error
        if url != teacher.url:
            raise ServiceLost(
                f"local teacher {teacher.name!r} died and came up at {url}; scorers look for it at {teacher.url}"
            )

    def _place(self, teacher: Teacher) -> None:
        options = self._placement.options(f"teacher {teacher.name}")
        if teacher.node is not None and "scheduling_strategy" not in options:  # scorers know its address
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(teacher.node, soft=False)
        actor = ray.remote(TeacherActor).options(**options)
        teacher.handle = actor.remote(teacher.section, teacher.key, self._config.sync_in_run)
        teacher.started = teacher.handle.start.remote(on_cluster=not local_cluster())

    async def _ask_info(self, teacher: Teacher, ca_file: str | None) -> TeacherInfo:
        timeout_s = teacher.section.request_timeout_s
        client = TeacherClient(teacher.url, self._config.run.name, timeout_s, teacher.key, ca_file=ca_file)
        try:
            return await client.info()
        finally:
            await client.close()


async def ask_remote_teachers(config: Config) -> None:
    """Ask each teacher at a ``url`` for its information, and each ``endpoint`` for its model, before anything heavy
    starts.

    Raises TeacherError within `FIRST_ANSWER_S` for one that is down, and at once for a key that is missing or wrong.
    """
    for section in config.named_teachers().values():
        if section.url is None and section.backend == "remote":
            await asyncio.to_thread(ask_endpoint, section)
        if section.url is not None:
            key = None if section.client_key_file is None else read_key(section.client_key_file)
            ca_file = None if section.ca_file is None else str(section.ca_file)
            timeout_s = min(FIRST_ANSWER_S, section.request_timeout_s)
            client = TeacherClient(section.url, config.run.name, timeout_s, key, ca_file=ca_file)
            try:
                await client.info()
            finally:
                await client.close()


def local_cluster() -> bool:
    """True if this driver started its Ray cluster, which then has no other nodes."""
    node = ray._private.worker.global_worker.node
    return node is not None and bool(node.is_head())


def _metrics_page(teacher: Teacher) -> str:
    header = {"Authorization": f"Bearer {teacher.key}"}
    try:
        reply = httpx.get(f"{teacher.url}/metrics", headers=header, timeout=METRICS_TIMEOUT_S, trust_env=False)
        return reply.raise_for_status().text
    except httpx.HTTPError as error:
        raise OSError(f"{teacher.url}: {error}") from error
