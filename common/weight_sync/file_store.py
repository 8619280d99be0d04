"""Weights in a shared folder, as safetensors under their checkpoint names, readable by any program.

::

    FOLDER/version-000007/model-00001-of-00003.safetensors   one for each bucket
                          model.safetensors.index.json       the index that Hugging Face loaders read
                          manifest.json                      plan, sender and checksums

A version is written under a temporary name and renamed when all files are on disk: a folder of this name is complete.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.weight_sync.checksum import checksum
from common.weight_sync.collective import SyncError
from common.weight_sync.manifest import SyncManifest, TensorSpec, bucket_nbytes, split_bucket
from common.weight_sync.prefetch import prefetch

if TYPE_CHECKING:
    import torch
    from torch import Tensor

KEPT_VERSIONS = 2
POLL_S = 0.05
INDEX = "model.safetensors.index.json"
MANIFEST = "manifest.json"
_FOLDER = re.compile(r"version-(\d+)")
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""torch's name -> safetensors'."""


@dataclass(frozen=True, slots=True)
class VersionManifest:
    """``manifest.json``: digest of the plan, session of the sender, hex xxh3 of each shard's tensor bytes."""

    version: int
    session: str
    digest: str
    shards: dict[str, str]


def session_name(host: str, port: int) -> str:
    """Name of one sender's session: a resumed run may publish a version that is already in the folder."""
    return f"{host}:{port}"


def version_folder(folder: Path, version: int) -> Path:
    """Folder of a complete version."""
    return folder / f"version-{version:06d}"


def shard_names(count: int) -> list[str]:
    """File names of all shards."""
    return [f"model-{index:05d}-of-{count:05d}.safetensors" for index in range(1, count + 1)]


def shard_header(bucket: tuple[TensorSpec, ...]) -> bytes:
    """Header of a safetensors file that holds these tensors in this order without gaps."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in bucket:
        end = offset + spec.nbytes
        entries[spec.name] = {"dtype": _DTYPES[spec.dtype], "shape": spec.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class VersionWriter:
    """Writes one version: `add` every bucket in order, then `commit`."""

    def __init__(self, folder: Path, manifest: SyncManifest, session: str) -> None:
        if manifest.version is None:
            raise SyncError("weights for a folder need a version")
        self._folder = folder
        self._manifest = manifest
        self._version = manifest.version
        self._session = session
        self._buckets = list(manifest.buckets())
        self._names = shard_names(len(self._buckets))
        self._checksums: dict[str, str] = {}
        self._partial = folder / f".{version_folder(folder, self._version).name}.partial"
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)

    def add(self, index: int, data: Tensor, digest: bytes) -> None:
        """Write a bucket's bytes (in host memory) as its shard and record their checksum."""
        name = self._names[index]
        _write(self._partial / name, shard_header(self._buckets[index]), data.numpy().data)
        self._checksums[name] = digest.hex()

    def commit(self) -> Path:
        """Write index and manifest, rename to the final name, delete old versions."""
        weight_map = {
            spec.name: name for name, bucket in zip(self._names, self._buckets, strict=True) for spec in bucket
        }
        index = {"metadata": {"total_size": self._manifest.nbytes}, "weight_map": weight_map}
        _write(self._partial / INDEX, json.dumps(index, indent=1).encode())
        written = VersionManifest(self._version, self._session, self._manifest.digest(), self._checksums)
        _write(self._partial / MANIFEST, json.dumps(asdict(written), indent=1).encode())
        _sync_folder(self._partial)
        final = version_folder(self._folder, self._version)
        if final.exists():
            shutil.rmtree(final)
        os.rename(self._partial, final)
        _sync_folder(self._folder)
        self._rotate()
        return final

    def _rotate(self) -> None:
        """Keep this version and the one before; a higher number belongs to a run that this one resumed before."""
        found = {int(match[1]): path for path in self._folder.iterdir() if (match := _FOLDER.fullmatch(path.name))}
        kept = sorted(version for version in found if version <= self._version)[-KEPT_VERSIONS:]
        for version, path in found.items():
            if version not in kept:
                shutil.rmtree(path)


class FileReceiver:
    """Waits for a version of `session` in `folder`, then reads it."""

    def __init__(self, folder: Path, session: str, timeout_s: float, device: torch.device | str) -> None:
        self._folder = folder
        self._session = session
        self._timeout_s = timeout_s
        self._device = device

    def receive(self, manifest: SyncManifest) -> Iterator[tuple[str, Tensor]]:
        """See `common.weight_sync.receiver.Receiver`; the manifest needs a version."""
        if manifest.version is None:
            raise SyncError("a receiver over `file` needs the version: pass `manifest.at(version)`")
        folder = version_folder(self._folder, manifest.version)
        written = self._wait(folder)
        if written.digest != manifest.digest():
            raise SyncError(
                f"{folder} was written to the manifest {written.digest}, this receiver's is {manifest.digest()}: "
                "learner and receiver do not agree on names, shapes, types or bucket size"
            )
        for bucket, data in prefetch(read_shards(folder, manifest, written)):
            for spec, tensor in split_bucket(bucket, data):
                yield spec.name, tensor.to(self._device)

    def close(self) -> None:
        """Do nothing: no resource is held."""

    def _wait(self, folder: Path) -> VersionManifest:
        limit = time.monotonic() + self._timeout_s
        while True:
            written = read_manifest(folder)
            if written is not None and written.session == self._session:
                return written
            if time.monotonic() > limit:
                raise SyncError(
                    f"{folder} did not appear within {self._timeout_s:.0f} s: learner and receiver must share "
                    f"sync.folder ({'the folder has one of an earlier sender' if written else 'the folder has none'})"
                )
            time.sleep(POLL_S)


def read_manifest(folder: Path) -> VersionManifest | None:
    """Read the manifest of a complete version; None if it is absent (or is being replaced)."""
    try:
        return VersionManifest(**json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (TypeError, ValueError) as error:
        raise SyncError(f"{folder / MANIFEST} is not a manifest of weights: {error}") from error


def read_shards(
    folder: Path, manifest: SyncManifest, written: VersionManifest
) -> Iterator[tuple[tuple[TensorSpec, ...], Tensor]]:
    """Yield (tensors, their bytes) of each bucket; raises the SyncError of `read_shard`."""
    buckets = list(manifest.buckets())
    for name, bucket in zip(shard_names(len(buckets)), buckets, strict=True):
        yield bucket, read_shard(folder / name, bucket, written.shards[name])


def read_shard(path: Path, bucket: tuple[TensorSpec, ...], expected: str) -> Tensor:
    """Read the bytes of a bucket from its shard; raises SyncError if header, length or checksum is wrong."""
    import numpy as np
    import torch

    header, nbytes = shard_header(bucket), bucket_nbytes(bucket)
    data = np.empty(nbytes, np.uint8)
    try:
        with path.open("rb") as file:
            actual = file.read(len(header))
            read = file.readinto(data.data) + len(file.read(1))
    except OSError as error:
        raise SyncError(f"{path} cannot be read: {error}") from error
    if actual != header:
        raise SyncError(f"{path} does not begin with the header of {bucket[0].name} ...")
    if read != nbytes:
        raise SyncError(f"{path} holds {read} or more bytes of tensors, {nbytes} were written")
    tensor = torch.from_numpy(data)
    if checksum(tensor).hex() != expected:
        raise SyncError(f"{path} holds other bytes than were written")
    return tensor


def _write(path: Path, *parts: bytes | memoryview) -> None:
    with path.open("wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
