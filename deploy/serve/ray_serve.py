"""The teacher under Ray Serve: the same application in several replicas, each request sent where its context is.

``serve run deploy.serve.ray_serve:teacher config=CONFIG`` starts it; ``deploy/configs/ray-serve.yaml`` is the same for
``serve deploy`` and for a RayService of Kubernetes. Serve's own consistent-hash router reads the header that the client
sets to the hash of the context, so a context's state is computed, and kept, by one replica. When replicas come or go,
contexts move: the new replica answers ``unknown_context`` and the client puts them again.
"""

# No `from __future__ import annotations` here: Serve looks for the class of `args` in the annotation itself.
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from common.config.loader import load_teacher_config
from common.config.model import TeacherServerConfig

if TYPE_CHECKING:
    from teacher_server.scoring.service import TeacherService

ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"

REPLICA_HEADER = "X-Replica"
"""Of every reply: which replica gave it."""

MAX_ONGOING_REQUESTS = 1024
"""Of a replica. Above any real load: a full teacher answers 429 itself, which its clients know how to wait out."""

DRAIN_S = 600.0
"""Longest wait for the requests of a replica that is taken away."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Asgi = Callable[[Message, Receive, Send], Awaitable[None]]


class TeacherArgs(BaseModel):
    """``args`` of the application in a Serve config file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: str
    """Path of the configuration, on the head node."""
    overrides: tuple[str, ...] = ()
    """As on the command line, ``teacher.threads=4``."""
    min_replicas: Annotated[int, Field(ge=1)] = 1
    max_replicas: Annotated[int, Field(ge=1)] = 4
    target_requests: Annotated[float, Field(gt=0)] = 8.0
    """Requests per replica, running and queued, that autoscaling aims at."""
    upscale_delay_s: Annotated[float, Field(ge=0)] = 30.0
    """How long there must be more requests than that before replicas are added; contexts move to them."""
    downscale_delay_s: Annotated[float, Field(ge=0)] = 600.0
    """How long there must be fewer before replicas go, and what they hold of contexts with them."""
    cpus: Annotated[float, Field(ge=0)] = 1.0
    """Of a replica; its GPUs are ``teacher.gpus``."""


class TeacherReplica:
    """One replica. The model is loaded where the replica runs."""

    def __init__(self, config: TeacherServerConfig) -> None:
        self._config = config
        self._service: TeacherService | None = None

    def __serve_build_asgi_app__(self) -> Asgi:
        """What Serve calls for the application."""
        from teacher_server.http.serve import build_app

        app = build_app(self._config)
        self._service = app.state.service
        return signed(app, serve.get_replica_context().replica_id.unique_id)

    def check_health(self) -> None:
        """What Serve calls every few seconds; it replaces a replica where this raises: RuntimeError says why."""
        if self._service is not None and self._service.failure is not None:
            raise RuntimeError(f"this replica of the teacher must be replaced: {self._service.failure}")


def teacher(args: TeacherArgs) -> serve.Application:
    """The application that ``import_path: deploy.serve.ray_serve:teacher`` names; raises ConfigError."""
    config = load_teacher_config(args.config, args.overrides)
    deployment = serve.deployment(
        serve.ingress()(TeacherReplica),
        name="Teacher",
        ray_actor_options={"num_cpus": args.cpus, "num_gpus": config.teacher.gpus},
        autoscaling_config=AutoscalingConfig(
            min_replicas=args.min_replicas,
            initial_replicas=args.min_replicas,
            max_replicas=args.max_replicas,
            target_ongoing_requests=args.target_requests,
            upscale_delay_s=args.upscale_delay_s,
            downscale_delay_s=args.downscale_delay_s,
        ),
        request_router_config=RequestRouterConfig(
            request_router_class=ROUTER,
            # Nobody else has the context: a busy replica is waited for.
            request_router_kwargs={"num_fallback_replicas": 0},
        ),
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        graceful_shutdown_timeout_s=DRAIN_S,
    )
    return deployment.bind(config)


def signed(app: Asgi, replica: str) -> Asgi:
    """`app`, its replies marked with the replica's name."""
    header = (REPLICA_HEADER.lower().encode(), replica.encode())

    async def marked(scope: Message, receive: Receive, send: Send) -> None:
        async def mark(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), header]}
            await send(message)

        await app(scope, receive, mark)

    return marked
