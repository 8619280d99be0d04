"""Weights into vLLM: this project's receiver behind vLLM's weight-transfer interface, on any device."""

from __future__ import annotations

from dataclasses import dataclass
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
from rollout_workers.vllm_plugin.arrival import ArrivalProof
from rollout_workers.vllm_plugin.gpt_oss import one_expert_at_a_time
from rollout_workers.vllm_plugin.packed_copies import PackedCopies

if TYPE_CHECKING:
    from common.weight_sync.receiver import Receiver


@dataclass
class SyncInitInfo(WeightTransferInitInfo):
    """Address of the weight group, first rank of this engine's workers in it, and the ``sync`` section."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    sync: dict[str, Any]


@dataclass
class SyncUpdateInfo(WeightTransferUpdateInfo):
    """A `SyncManifest` as plain fields; `digest` is that of the controller's manifest."""

    tensors: list[dict[str, Any]]
    bucket_bytes: int
    version: int | None
    digest: str

    def manifest(self) -> SyncManifest:
        """Build the manifest; raises SyncError if its digest differs."""
        specs = (TensorSpec(spec["name"], spec["dtype"], tuple(spec["shape"])) for spec in self.tensors)
        manifest = SyncManifest(tuple(specs), self.bucket_bytes, self.version)
        if manifest.digest() != self.digest:
            raise SyncError(f"the manifest's digest is {manifest.digest()}, it was sent as {self.digest}")
        return manifest


class SyncWeightTransferEngine(WeightTransferEngine[SyncInitInfo, SyncUpdateInfo]):
    """Loads the tensors of a `Receiver` with vLLM's layerwise reload."""

    init_info_cls = SyncInitInfo
    update_info_cls = SyncUpdateInfo
    _receiver: Receiver | None = None
    _packed: PackedCopies | None = None

    def init_transfer_engine(self, init_info: SyncInitInfo) -> None:
        """Join the group, leaving the previous one; every worker of every engine has its own rank."""
        self.shutdown()
        parallel = self.parallel_config
        rank = init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        sync = SyncConfig.model_validate(init_info.sync)
        # Tensors that arrive in host memory stay there: loading copies each layer to its device.
        device = self.device if sync.backend in ("nccl", "ipc") else "cpu"
        self._receiver = open_receiver(
            sync, init_info.master_address, init_info.master_port, rank, init_info.world_size, device
        )

    def start_weight_update(self) -> None:
        """Prepare the model for loading checkpoint weights again."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self._packed = PackedCopies(self.model)
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive and load. The base class would synchronise an accelerator, which a CPU lacks."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: SyncUpdateInfo) -> None:
        """Load all weights; raises SyncError as `common.weight_sync.receiver.Receiver` does, and if a parameter was not
        written.

        After an error the model holds parts of two versions, but can take another update.
        """
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        if self._receiver is None:
            raise SyncError("weights were announced before the weight group was joined")
        proof = ArrivalProof(self.model)
        try:
            with proof.counting():
                weights = self._receiver.receive(update_info.manifest())
                self.model.load_weights(one_expert_at_a_time(self.model, weights))
            proof.check()
        except BaseException:
            # Otherwise half-loaded layers would count their elements towards the next update.
            finalize_layerwise_reload(self.model, self.model_config)
            raise

    def finish_weight_update(self) -> None:
        """Process the loaded layers, tied output layers included; raises SyncError for one left with old weights."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        if self._packed is not None:
            self._packed.renew()
            self._packed = None

    def shutdown(self) -> None:
        """Leave the group."""
        if self._receiver is not None:
            self._receiver.close()
            self._receiver = None
