"""The teacher of one run, as a plain class for ``ray.remote``: the same server, inside an actor's process."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from common.config.model import SyncConfig, TeacherServerConfig
from common.weight_sync.collective import SyncError
from common.weight_sync.manifest import SyncManifest
from teacher_server.http.auth import authenticator, single_key

if TYPE_CHECKING:
    from common.weight_sync.receiver import Receiver
    from teacher_server.http.serve import RunningServer
    from teacher_server.scoring.service import TeacherService


log = logging.getLogger(__name__)


def end_process(why: str) -> None:
    """End this process at once, from whichever thread: an exception would end the thread only."""
    log.critical("the teacher's process ends: %s", why)
    logging.shutdown()
    os._exit(1)


class TeacherActor:
    """Serves from a thread of the actor's process, so that it lives and dies with the run.

    The process ends when nothing is computed any more: whoever watches the actor then starts another.
    """

    def __init__(self, config: TeacherServerConfig, api_key: str | None = None, sync: SyncConfig | None = None) -> None:
        """Serves who has `api_key`; without one, anybody who reaches ``teacher.host``, then a loopback address."""
        self._config = config.teacher
        self._api_key = api_key
        self._sync = sync
        self._server: RunningServer | None = None
        self._service: TeacherService | None = None
        self._receiver: Receiver | None = None

    def start(self) -> str:
        """Load the model and serve; returns the address. Raises TeacherError."""
        if self._server is None:
            # Here and not above: the driver names this class and needs neither torch nor transformers for it.
            from teacher_server.http.serve import build_service, start_in_thread

            host, key = self._config.host, self._api_key
            auth = authenticator(host, None, allow_anonymous=True, environ={}) if key is None else single_key(key)
            self._service = build_service(self._config, on_failure=end_process)
            self._server = start_in_thread(self._service, self._config, auth)
        return self._server.url

    def join_sync(self, host: str, port: int, rank: int, world_size: int) -> None:
        """Join the run's weight group as its member `rank`, in place of the one joined before. Raises SyncError."""
        from common.weight_sync.receiver import open_receiver

        if self._sync is None:
            raise SyncError("this teacher was started without sync settings: it takes no weights")
        if self._receiver is not None:
            self._receiver.close()
        self._receiver = open_receiver(self._sync, host, port, rank, world_size, self._running.device)

    def receive_weights(self, manifest: SyncManifest, version: int) -> None:
        """Take the weights of `version` between two batches. Raises SyncError; it scores nothing any more then."""
        if self._receiver is None:
            raise SyncError("the teacher was asked to receive weights before it joined the weight group")
        self._running.load_weights(self._receiver.receive(manifest.at(version)), version)

    def save_state(self, path: str) -> None:
        """Write what a resumed run needs of this teacher: an average and its version."""
        self._running.save_state(Path(path))

    def load_state(self, path: str) -> None:
        """Go on from `save_state`."""
        self._running.load_state(Path(path))

    def node_id(self) -> str:
        """The cluster node this runs on; also the sign that it lives."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def stop(self) -> None:
        """Finish what was begun, then stop serving."""
        if self._receiver is not None:
            self._receiver.close()
            self._receiver = None
        if self._server is not None:
            self._server.stop()
            self._server = None

    @property
    def _running(self) -> TeacherService:
        if self._service is None:
            raise RuntimeError("the teacher was called before start")
        return self._service
