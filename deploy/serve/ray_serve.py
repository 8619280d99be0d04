"""The teacher under Ray Serve: several replicas, and requests with one context go to one replica.

``serve run deploy.serve.ray_serve:teacher config=CONFIG`` starts the teacher; ``deploy/configs/ray-serve.yaml`` is for
``serve deploy`` and for a RayService of Kubernetes. Serve's consistent-hash router reads the header in which the client
sends the hash of the context, so one replica computes and keeps a context's state. When the number of replicas changes,
contexts move: the new replica answers ``unknown_context``, and the client uploads the context again.
"""

# Without `from __future__ import annotations`, because Serve reads the class of `args` from the annotation.
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Annotated, Any

import ray
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from common.config.loader import load_teacher_config
from common.config.model import TeacherServerConfig
from common.devices import see_only

if TYPE_CHECKING:
    from teacher_server.scoring.service import TeacherService

ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"

REPLICA_HEADER = "X-Replica"
"""Header of every reply with the replica's id."""

MAX_ONGOING_REQUESTS = 1024
"""Limit per replica, above any real load: a full teacher answers 429 itself, and its clients wait and retry."""

DRAIN_S = 600.0
"""Longest wait for the requests of a replica that is being removed."""

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
    """Overrides as on the command line, ``teacher.threads=4``."""
    min_replicas: Annotated[int, Field(ge=1)] = 1
    max_replicas: Annotated[int, Field(ge=1)] = 4
    target_requests: Annotated[float, Field(gt=0)] = 8.0
    """Autoscaling's target of running and queued requests per replica."""
    load_window_s: Annotated[float, Field(gt=10)] = 30.0
    """Seconds over which the load is averaged; Serve measures it every 10 s."""
    upscale_delay_s: Annotated[float, Field(ge=0)] = 30.0
    """Time above the target before replicas are added; some contexts move to the new replicas."""
    downscale_delay_s: Annotated[float, Field(ge=0)] = 600.0
    """Time below the target before replicas are removed, together with the context states they hold."""
    cpus: Annotated[float, Field(ge=0)] = 1.0
    """CPUs of a replica; its GPUs are ``teacher.gpus``."""


class TeacherReplica:
    """One replica. Loads the model in the replica's process."""

    def __init__(self, config: TeacherServerConfig) -> None:
        self._config = config
        self._service: TeacherService | None = None

    def __serve_build_asgi_app__(self) -> Asgi:
        """Build the ASGI application; Serve calls this."""
        see_only(ray.get_gpu_ids())
        from teacher_server.http.serve import build_app

        app = build_app(self._config.teacher)
        self._service = app.state.service
        return with_replica_header(app, serve.get_replica_context().replica_id.unique_id)

    def check_health(self) -> None:
        """Raise RuntimeError if the service has failed; Serve calls this every few seconds and replaces the replica."""
        if self._service is not None and self._service.failure is not None:
            raise RuntimeError(f"this replica of the teacher must be replaced: {self._service.failure}")


def teacher(args: TeacherArgs) -> serve.Application:
    """Return the application that ``import_path: deploy.serve.ray_serve:teacher`` names. Raises ConfigError."""
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
            look_back_period_s=args.load_window_s,
            upscale_delay_s=args.upscale_delay_s,
            downscale_delay_s=args.downscale_delay_s,
        ),
        request_router_config=RequestRouterConfig(
            request_router_class=ROUTER,
            # Wait for a busy replica, because no other replica has the context.
            request_router_kwargs={"num_fallback_replicas": 0},
        ),
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        graceful_shutdown_timeout_s=DRAIN_S,
    )
    return deployment.bind(config)


def with_replica_header(app: Asgi, replica: str) -> Asgi:
    """Add the replica's id to the replies of `app`."""
    header = (REPLICA_HEADER.lower().encode(), replica.encode())

    async def wrapped(scope: Message, receive: Receive, send: Send) -> None:
        async def send_with_header(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), header]}
            await send(message)

        await app(scope, receive, send_with_header)

    return wrapped
