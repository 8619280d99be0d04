"""The teacher of one run, as a plain class for ``ray.remote``: the same server, inside an actor's process."""

from __future__ import annotations

from common.config import TeacherServerConfig
from teacher_server.serve import RunningServer, build_service, start_in_thread


class TeacherActor:
    """Serves from a thread of the actor's process, so that it lives and dies with the run."""

    def __init__(self, config: TeacherServerConfig) -> None:
        self._config = config.teacher
        self._server: RunningServer | None = None

    def start(self) -> str:
        """Load the model and serve; returns the address. Raises TeacherError."""
        if self._server is None:
            self._server = start_in_thread(build_service(self._config), self._config)
        return self._server.url

    def stop(self) -> None:
        """Finish what was begun, then stop serving."""
        if self._server is not None:
            self._server.stop()
            self._server = None
