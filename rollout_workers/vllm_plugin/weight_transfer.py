"""Weights into vLLM: this project's receiver behind vLLM's weight-transfer interface, on any device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from common.config.model import SyncConfig
from common.weight_sync.collective import SyncError
from common.weight_sync.manifest import SyncManifest, TensorSpec
from common.weight_sync.receiver import open_receiver

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

        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive and load. The base class would synchronise an accelerator, which a CPU lacks."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: SyncUpdateInfo) -> None:
        """Load all weights; raises SyncError as `common.weight_sync.receiver.Receiver` does.

        After an error the model holds parts of two versions, but can take another update.
        """
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        if self._receiver is None:
            raise SyncError("weights were announced before the weight group was joined")
        try:
            self.model.load_weights(self._receiver.receive(update_info.manifest()))
            refuse_incomplete_layers(self.model)
        except BaseException:
            # Otherwise half-loaded layers would count their elements towards the next update.
            finalize_layerwise_reload(self.model, self.model_config)
            raise

    def finish_weight_update(self) -> None:
        """Process the loaded layers, including the output layer."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            repack_output_layer(self.model)

    def shutdown(self) -> None:
        """Leave the group."""
        if self._receiver is not None:
            self._receiver.close()
            self._receiver = None


def refuse_incomplete_layers(model: nn.Module) -> None:
    """Raise SyncError if an unquantised linear layer got only a part of its weights.

    vLLM would keep its old weights or leave elements undefined, since it cannot tell missing ones from padding.
    """
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    incomplete = []
    for name, layer in model.named_modules():
        info = get_layerwise_info(layer)  # complete layers have left the loading state
        if info.can_load() and type(getattr(layer, "quant_method", None)) is UnquantizedLinearMethod:
            incomplete.append(f"{name} ({info.load_numel:,} of {info.load_numel_total:,} elements)")
    if incomplete:
        more = f" and {len(incomplete) - 3} more" if len(incomplete) > 3 else ""
        raise SyncError(f"a sync left layers without all of their weight: {', '.join(incomplete[:3])}{more}")


def repack_output_layer(model: nn.Module) -> None:
    """Repack a CPU model's output layer after a reload.

    vLLM keeps the weight and a packed copy, which would go on using the old weights. A tied weight is loaded as
    the embedding, which vLLM packs too: the embedding never uses its packed copy, so it shares the new one.
    """
    head: Any = getattr(model, "lm_head", None)
    weight = getattr(head, "weight", None)
    if weight is None or not hasattr(head, "quant_method"):
        return
    head.quant_method.process_weights_after_loading(head)
    for layer in model.modules():
        if getattr(layer, "weight", None) is weight and hasattr(layer, "cpu_linear"):
            layer.cpu_linear = head.cpu_linear
