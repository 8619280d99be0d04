"""Arguments of a weight sync as plain fields, which vLLM passes to its worker processes."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from common.config.model import SyncConfig
from common.weight_sync.manifest import SyncManifest

WEIGHT_TRANSFER = "opcd"
"""Name of this project's weight transfer engine in vLLM, for every ``sync.backend``."""


def init_info(sync: SyncConfig, host: str, port: int, rank: int, world_size: int) -> dict[str, Any]:
    """Address of the weight group, and the first rank of the engine's workers in it."""
    return {
        "master_address": host,
        "master_port": port,
        "rank_offset": rank,
        "world_size": world_size,
        "sync": sync.model_dump(mode="json"),
    }


def update_info(manifest: SyncManifest) -> dict[str, Any]:
    """A manifest and its digest."""
    return {
        "tensors": [asdict(tensor) for tensor in manifest.tensors],
        "bucket_bytes": manifest.bucket_bytes,
        "version": manifest.version,
        "digest": manifest.digest(),
    }
