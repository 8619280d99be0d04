"""The teacher of one run: a plain class for ``ray.remote`` that runs the HTTP server inside the actor's process."""

from __future__ import annotations

import logging
import os
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

import ray

from common.config.model import SyncConfig, TeacherConfig
from common.devices import limit_memory, see_only
from common.network import use_interface_of
from common.protocol.scoring import TeacherError
from common.weight_sync.collective import SyncError
from common.weight_sync.manifest import SyncManifest
from teacher_server.http.auth import authenticator, single_key

if TYPE_CHECKING:
    from common.weight_sync.receiver import Receiver
    from teacher_server.http.serve import RunningServer
    from teacher_server.scoring.service import TeacherService


log = logging.getLogger(__name__)


def end_process(reason: str) -> None:
    """End this process at once, from any thread. An exception would end only its thread."""
    log.critical("the teacher's process ends: %s", reason)
    logging.shutdown()
    os._exit(1)


def ask_endpoint(config: TeacherConfig) -> None:
    """Ask the endpoint of a `remote` teacher for its model, before anything heavy starts.

    Raises TeacherError, within seconds if it is down.
    """
    from teacher_server.backends.base import BackendError
    from teacher_server.backends.remote.backend import connect

    try:
        connect(config).close()
    except BackendError as error:
        raise TeacherError(str(error)) from error


class TeacherActor:
    """Serves from a thread of the actor's process, so the server ends with the run.

    The process ends when the service breaks. The run watches the actor and then starts another one.
    """

    def __init__(self, config: TeacherConfig, api_key: str | None = None, sync: SyncConfig | None = None) -> None:
        """Serves clients with `api_key`; without a key, all clients, but only on a loopback ``teacher.host``."""
        if ray.is_initialized():
            see_only(ray.get_gpu_ids())
        self._config = config
        self._api_key = api_key
        self._sync = sync
        self._server: RunningServer | None = None
        self._service: TeacherService | None = None
        self._receiver: Receiver | None = None

    def start(self, on_cluster: bool = False) -> str:
        """Load the model and serve. Returns the address. Raises TeacherError.

        Without a ``teacher.host`` it listens on its node's address with `on_cluster`, else on the loopback address.
        """
        if self._server is None:
            # The driver imports this module and needs neither torch nor transformers.
            from teacher_server.http.serve import build_service, start_in_thread

            if on_cluster:
                address = ray.util.get_node_ip_address()
                use_interface_of(address)  # for the weight group of a live teacher
                self._config = self._config.model_copy(update={"host": self._config.host or address})
            host, key = self._config.listen_host, self._api_key
            auth = authenticator(host, None, allow_anonymous=True, environ={}) if key is None else single_key(key)
            if self._config.backend == "transformers":  # vLLM measures by itself
                limit_memory(self._config.gpus)
            self._service = build_service(self._config, on_failure=end_process)
            self._server = start_in_thread(self._service, self._config, auth)
        return self._server.url

    def join_sync(self, host: str, port: int, rank: int, world_size: int) -> None:
        """Join the run's weight group as member `rank`; leaves an earlier group. Raises SyncError."""
        from common.weight_sync.receiver import open_receiver

        if self._sync is None:
            raise SyncError("this teacher was started without sync settings, so it takes no weights")
        if self._receiver is not None:
            self._receiver.close()
        self._receiver = open_receiver(self._sync, host, port, rank, world_size, self.service.device)

    def receive_weights(self, manifest: SyncManifest, version: int) -> None:
        """Load the weights of `version` between two batches, if ``teacher.refresh_every`` divides it.

        Otherwise they are received, as the sync needs every member, and dropped. Raises SyncError. A teacher that was
        loading then refuses every request: its weights are a mixture of two versions.
        """
        if self._receiver is None:
            raise SyncError("receive_weights was called before join_sync")
        received = self._receiver.receive(manifest.at(version))
        if version % self._config.refresh_every:
            deque(received, maxlen=0)
        else:
            self.service.load_weights(received, version)

    def save_state(self, path: str) -> None:
        """Write the weights and their version, for a resumed run."""
        self.service.save_state(Path(path))

    def load_state(self, path: str) -> None:
        """Read the file of `save_state`."""
        self.service.load_state(Path(path))

    def node_id(self) -> str:
        """Id of the actor's cluster node. The run also calls this to see that the actor is alive."""
        return str(ray.get_runtime_context().get_node_id())

    def stop(self) -> None:
        """Finish the requests in progress, then stop serving."""
        if self._receiver is not None:
            self._receiver.close()
            self._receiver = None
        if self._server is not None:
            self._server.stop()
            self._server = None

    @property
    def service(self) -> TeacherService:
        """The scoring service. Raises RuntimeError before `start`."""
        if self._service is None:
            raise RuntimeError("the teacher was called before start")
        return self._service
