"""The teacher of one run, as a plain class for ``ray.remote``: the same server, inside an actor's process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.config import SyncConfig, TeacherServerConfig
from teacher_server.auth import authenticator, single_key

if TYPE_CHECKING:
    from teacher_server.serve import RunningServer


class TeacherActor:
    """Serves from a thread of the actor's process, so that it lives and dies with the run."""

    def __init__(self, config: TeacherServerConfig, api_key: str | None = None, sync: SyncConfig | None = None) -> None:
        """Serves who has `api_key`; without one, anybody who reaches ``teacher.host``, then a loopback address."""
        self._config = config.teacher
        self._api_key = api_key
        self._sync = sync
        self._server: RunningServer | None = None

    def start(self) -> str:
        """Load the model and serve; returns the address. Raises TeacherError."""
        if self._server is None:
            # Here and not above: the driver names this class and needs neither torch nor transformers for it.
            from teacher_server.serve import build_service, start_in_thread

            host, key = self._config.host, self._api_key
            auth = authenticator(host, None, allow_anonymous=True) if key is None else single_key(key)
            self._server = start_in_thread(build_service(self._config), self._config, auth)
        return self._server.url

    def node_id(self) -> str:
        """The cluster node this runs on; also the sign that it lives."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def stop(self) -> None:
        """Finish what was begun, then stop serving."""
        if self._server is not None:
            self._server.stop()
            self._server = None
