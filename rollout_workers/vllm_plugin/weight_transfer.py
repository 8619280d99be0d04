"""Weights into vLLM: this project's receiver behind vLLM's own weight-transfer interface, on any device."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from common.config.model import SyncConfig
from common.weight_sync.collective import SyncError
from common.weight_sync.manifest import SyncManifest, TensorSpec
from common.weight_sync.receiver import open_receiver
from rollout_workers.vllm_plugin.repacking import Repacking, repack_output_layer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from common.weight_sync.receiver import Receiver


@dataclass
class SyncInitInfo(WeightTransferInitInfo):
    """Where the weight group meets, the first rank of this engine's workers in it, and the settings of `sync`."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    sync: dict[str, Any]


@dataclass
class SyncUpdateInfo(WeightTransferUpdateInfo):
    """A `SyncManifest` as plain fields; `digest` is the one the controller's manifest has."""

    tensors: list[dict[str, Any]]
    bucket_bytes: int
    version: int | None
    digest: str

    def manifest(self) -> SyncManifest:
        """The plan; raises SyncError where it is not the one that was meant."""
        specs = (TensorSpec(spec["name"], spec["dtype"], tuple(spec["shape"])) for spec in self.tensors)
        manifest = SyncManifest(tuple(specs), self.bucket_bytes, self.version)
        if manifest.digest() != self.digest:
            raise SyncError(f"the manifest's digest is {manifest.digest()}, it was sent as {self.digest}")
        return manifest


class SyncWeightTransferEngine(WeightTransferEngine[SyncInitInfo, SyncUpdateInfo]):
    """Takes checkpoint-named tensors from a `Receiver` and loads them layer by layer: on a CPU, where the model allows
    it, with `Repacking`, otherwise with vLLM's layerwise reload.
    """

    init_info_cls = SyncInitInfo
    update_info_cls = SyncUpdateInfo
    _receiver: Receiver | None = None

    def init_transfer_engine(self, init_info: SyncInitInfo) -> None:
        """Join the group, leaving the one before; every worker of every engine has a rank of its own."""
        self.shutdown()
        parallel = self.parallel_config
        rank = init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        sync = SyncConfig.model_validate(init_info.sync)
        # What comes through host memory stays there: loading copies each layer to the device it belongs to.
        device = self.device if sync.backend in ("nccl", "ipc") else "cpu"
        self._receiver = open_receiver(
            sync, init_info.master_address, init_info.master_port, rank, init_info.world_size, device
        )

    @cached_property
    def _repacking(self) -> Repacking | None:
        """Found out at the first update, for all of them: layerwise reload leaves layers in another state."""
        on_cpu = self.device.type == "cpu"
        fits = on_cpu and Repacking.fits(self.model, self.parallel_config.world_size)
        return Repacking(self.model) if fits else None

    def start_weight_update(self) -> None:
        """Put the model into the state in which checkpoint weights can be loaded again."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        if self._repacking is not None:
            self._repacking.begin()
        else:
            initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive and load. The base class synchronises an accelerator afterwards; a CPU has none."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: SyncUpdateInfo) -> None:
        """Load all weights. SyncError as in `common.weight_sync.receiver.Receiver`: the model then holds parts of two
        versions, but it can take an update again.
        """
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        if self._receiver is None:
            raise SyncError("weights were announced before the weight group was joined")
        try:
            with a_core_for_the_wire(self.device):
                self.model.load_weights(self._receiver.receive(update_info.manifest()))
                if self._repacking is not None:
                    self._repacking.finish()
        except BaseException:
            # Otherwise layers that are half loaded would count what they have towards the next update.
            if self._repacking is not None:
                self._repacking.give_up()
            else:
                finalize_layerwise_reload(self.model, self.model_config)
            raise

    def finish_weight_update(self) -> None:
        """Process the loaded layers, the output layer included."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        if self._repacking is None:
            finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            repack_output_layer(self.model)

    def shutdown(self) -> None:
        """Leave the group."""
        if self._receiver is not None:
            self._receiver.close()
            self._receiver = None


@contextmanager
def a_core_for_the_wire(device: torch.device) -> Iterator[None]:
    """On a CPU torch computes with one thread less: with all of them, each piece of a layer would wait, spinning, for
    the one whose core the next bucket arrives on. (vLLM's worker has put a no-op in the place of
    ``torch.set_num_threads``.)
    """
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch._C.set_num_threads(max(1, threads - 1))
    try:
        yield
    finally:
        torch._C.set_num_threads(threads)
