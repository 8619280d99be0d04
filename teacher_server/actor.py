"""The teacher of one run, as a plain class for ``ray.remote``: the same server, inside an actor's process."""

from __future__ import annotations

from common.config import TeacherServerConfig
from teacher_server.auth import authenticator, single_key
from teacher_server.serve import RunningServer, build_service, start_in_thread


class TeacherActor:
    """Serves from a thread of the actor's process, so that it lives and dies with the run."""

    def __init__(self, config: TeacherServerConfig, api_key: str | None = None) -> None:
        """Serves who has `api_key`; without one, anybody who reaches ``teacher.host``, then a loopback address."""
        self._config = config.teacher
        self._api_key = api_key
        self._server: RunningServer | None = None

    def start(self) -> str:
        """Load the model and serve; returns the address. Raises TeacherError."""
        if self._server is None:
            host, key = self._config.host, self._api_key
            auth = authenticator(host, None, allow_anonymous=True) if key is None else single_key(key)
            self._server = start_in_thread(build_service(self._config), self._config, auth)
        return self._server.url

    def stop(self) -> None:
        """Finish what was begun, then stop serving."""
        if self._server is not None:
            self._server.stop()
            self._server = None
