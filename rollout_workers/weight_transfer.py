"""Weights into vLLM over gloo: the CPU counterpart of vLLM's nccl engine, for its weight-transfer API."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from common.collective import DIGEST_BYTES, SyncError, broadcast, gloo_group, manifest_digest, wire_digest
from common.weights import SyncManifest, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.distributed import ProcessGroupGloo


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """Where the weight group meets, and the first rank of this engine's workers in it."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    timeout_s: float


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """A `SyncManifest` as plain fields; `digest` is the one the controller's manifest has."""

    tensors: list[dict[str, Any]]
    bucket_bytes: int
    digest: str

    def manifest(self) -> SyncManifest:
        """The plan; raises SyncError where it is not the one that was meant."""
        specs = (TensorSpec(spec["name"], spec["dtype"], tuple(spec["shape"])) for spec in self.tensors)
        manifest = SyncManifest(tuple(specs), self.bucket_bytes)
        if manifest.digest() != self.digest:
            raise SyncError(f"the manifest's digest is {manifest.digest()}, it was sent as {self.digest}")
        return manifest


class GlooWeightTransferEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """Receives checkpoint-named tensors bucket by bucket and loads them layer by layer."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo
    _group: ProcessGroupGloo | None = None

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        """Join the group; every worker of every engine has a rank of its own."""
        parallel = self.parallel_config
        rank = init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        self._group = gloo_group(
            init_info.master_address, init_info.master_port, rank, init_info.world_size, init_info.timeout_s
        )

    def start_weight_update(self) -> None:
        """Put the model into the state in which checkpoint weights can be loaded again."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive and load. The base class synchronises an accelerator afterwards; a CPU has none."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        """Load every bucket; raises SyncError for another plan than the sender's or bytes that changed on the way."""
        if self._group is None:
            raise SyncError("weights were announced before the weight group was joined")
        for bucket, data in receive_buckets(self._group, update_info.manifest()):
            self.model.load_weights([(spec.name, tensor) for spec, tensor in split_bucket(bucket, data)])

    def finish_weight_update(self) -> None:
        """Process the loaded layers, the tied output layer included."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        repack_output_layer(self.model)

    def shutdown(self) -> None:
        """Leave the group."""
        self._group = None


def receive_buckets(
    group: ProcessGroupGloo, manifest: SyncManifest
) -> Iterator[tuple[tuple[TensorSpec, ...], torch.Tensor]]:
    """(tensors, their bytes) of each bucket, the bytes checked against the digest that follows them."""
    announced = torch.empty(32, dtype=torch.uint8)
    broadcast(group, announced, "the manifest")
    if not announced.equal(manifest_digest(manifest.digest())):
        raise SyncError(
            f"the sender's manifest is {announced.numpy().tobytes().hex()}, this engine's {manifest.digest()}: "
            "learner and engine do not agree on names, shapes, types or bucket size"
        )
    for index, bucket in enumerate(manifest.buckets()):
        # A bucket of its own each time: layerwise reload may keep tensors until their layer is complete.
        data = torch.empty(sum(spec.nbytes for spec in bucket), dtype=torch.uint8)
        broadcast(group, data, f"bucket {index}")
        digest = torch.empty(DIGEST_BYTES, dtype=torch.uint8)
        broadcast(group, digest, f"the digest of bucket {index}")
        if not digest.equal(wire_digest(data)):
            raise SyncError(f"bucket {index} ({bucket[0].name} ...) arrived with other bytes than were sent")
        yield bucket, data


def split_bucket(bucket: tuple[TensorSpec, ...], data: torch.Tensor) -> Iterator[tuple[TensorSpec, torch.Tensor]]:
    """Views of a bucket's bytes as its tensors."""
    offset = 0
    for spec in bucket:
        end = offset + spec.nbytes
        yield spec, data[offset:end].view(getattr(torch, spec.dtype)).view(spec.shape)
        offset = end


def repack_output_layer(model: torch.nn.Module) -> None:
    """Pack a tied output layer again.

    On CPU linear weights are packed when they are loaded. Layerwise reload does that anew for what it loads, but a
    tied output layer is loaded as the embedding: its packed copy would go on answering with the old weights.
    """
    head: Any = getattr(model, "lm_head", None)
    if hasattr(head, "quant_method"):
        head.quant_method.process_weights_after_loading(head)
