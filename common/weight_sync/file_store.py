"""Weights through a shared folder, as safetensors under their checkpoint names: for engines, teachers, anything.

::

    FOLDER/version-000007/model-00001-of-00003.safetensors   one for each bucket
                          model.safetensors.index.json       the index that Hugging Face loaders read
                          manifest.json                      what was written, with checksums

A version is written under another name and renamed when all of it is on disk, the manifest last: a folder with this
name is complete.
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
from common.weight_sync.manifest import SyncManifest, TensorSpec, split_bucket
from common.weight_sync.prefetch import ahead

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
class Written:
    """``manifest.json``: the plan's digest, who wrote it, each shard's checksum (hex xxh3 of its tensors' bytes)."""

    version: int
    session: str
    digest: str
    shards: dict[str, str]


def session_of(host: str, port: int) -> str:
    """Name of one sender's time: a resumed run may publish a version that lies in the folder already."""
    return f"{host}:{port}"


def version_folder(folder: Path, version: int) -> Path:
    """Where a version lies when it is complete."""
    return folder / f"version-{version:06d}"


def shard_names(count: int) -> list[str]:
    """File names of all shards."""
    return [f"model-{index:05d}-of-{count:05d}.safetensors" for index in range(1, count + 1)]


def shard_header(bucket: tuple[TensorSpec, ...]) -> bytes:
    """What a safetensors file with these tensors, in this order and without gaps, begins with."""
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
    """One version on its way to disk: `add` every bucket in order, then `commit`."""

    def __init__(self, folder: Path, manifest: SyncManifest, session: str) -> None:
        if manifest.version is None:
            raise SyncError("weights for a folder need a version")
        self._folder = folder
        self._manifest = manifest
        self._version = manifest.version
        self._session = session
        self._buckets = list(manifest.buckets())
        self._names = shard_names(len(self._buckets))
        self._sums: dict[str, str] = {}
        self._partial = folder / f".{version_folder(folder, self._version).name}.partial"
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)

    def add(self, index: int, data: Tensor, digest: bytes) -> None:
        """Write a bucket's bytes (in host memory), with their checksum, as its shard."""
        name = self._names[index]
        _write(self._partial / name, shard_header(self._buckets[index]), data.numpy().data)
        self._sums[name] = digest.hex()

    def commit(self) -> Path:
        """Index, manifest, the final name; then versions that nobody needs any more go."""
        weight_map = {
            spec.name: name for name, bucket in zip(self._names, self._buckets, strict=True) for spec in bucket
        }
        index = {"metadata": {"total_size": self._manifest.nbytes}, "weight_map": weight_map}
        _write(self._partial / INDEX, json.dumps(index, indent=1).encode())
        written = Written(self._version, self._session, self._manifest.digest(), self._sums)
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
        """Keep this version and the one before it: one of a higher number is of a run that went on from before it."""
        found = {int(match[1]): path for path in self._folder.iterdir() if (match := _FOLDER.fullmatch(path.name))}
        kept = sorted(version for version in found if version <= self._version)[-KEPT_VERSIONS:]
        for version, path in found.items():
            if version not in kept:
                shutil.rmtree(path)


class FileReceiver:
    """Waits for a version of `session` in `folder` and reads it."""

    def __init__(self, folder: Path, session: str, timeout_s: float, device: torch.device | str) -> None:
        self._folder = folder
        self._session = session
        self._timeout_s = timeout_s
        self._device = device

    def receive(self, manifest: SyncManifest) -> Iterator[tuple[str, Tensor]]:
        """See `common.weight_sync.receiver.Receiver`; the manifest must name its version."""
        if manifest.version is None:
            raise SyncError("a receiver over `file` needs to know the version: give it `manifest.at(version)`")
        folder = version_folder(self._folder, manifest.version)
        written = self._wait(folder)
        if written.digest != manifest.digest():
            raise SyncError(
                f"{folder} was written to the manifest {written.digest}, this receiver's is {manifest.digest()}: "
                "learner and receiver do not agree on names, shapes, types or bucket size"
            )
        for bucket, data in ahead(read_shards(folder, manifest, written)):
            for spec, tensor in split_bucket(bucket, data):
                yield spec.name, tensor.to(self._device)

    def close(self) -> None:
        """Nothing is held."""

    def _wait(self, folder: Path) -> Written:
        limit = time.monotonic() + self._timeout_s
        while True:
            written = read_written(folder)
            if written is not None and written.session == self._session:
                return written
            if time.monotonic() > limit:
                raise SyncError(
                    f"{folder} did not appear within {self._timeout_s:.0f} s: learner and receiver must share "
                    f"sync.folder ({'there is one of an earlier sender' if written else 'there is none'})"
                )
            time.sleep(POLL_S)


def read_written(folder: Path) -> Written | None:
    """The manifest of a complete version; None where there is none (or it is just being replaced)."""
    try:
        return Written(**json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (TypeError, ValueError) as error:
        raise SyncError(f"{folder / MANIFEST} is not a manifest of weights: {error}") from error


def read_shards(
    folder: Path, manifest: SyncManifest, written: Written
) -> Iterator[tuple[tuple[TensorSpec, ...], Tensor]]:
    """(tensors, their bytes) of each bucket; SyncError as in `read_shard`."""
    buckets = list(manifest.buckets())
    for name, bucket in zip(shard_names(len(buckets)), buckets, strict=True):
        yield bucket, read_shard(folder / name, bucket, written.shards[name])


def read_shard(path: Path, bucket: tuple[TensorSpec, ...], meant: str) -> Tensor:
    """The bytes of a bucket from its shard; SyncError where header, length or checksum are not as they should be."""
    import numpy as np
    import torch

    header, nbytes = shard_header(bucket), sum(spec.nbytes for spec in bucket)
    data = np.empty(nbytes, np.uint8)
    try:
        with path.open("rb") as file:
            found = file.read(len(header))
            read = file.readinto(data.data) + len(file.read(1))
    except OSError as error:
        raise SyncError(f"{path} cannot be read: {error}") from error
    if found != header:
        raise SyncError(f"{path} does not begin with the header of {bucket[0].name} ...")
    if read != nbytes:
        raise SyncError(f"{path} holds {read} bytes of tensors (or more), {nbytes} were written")
    tensor = torch.from_numpy(data)
    if checksum(tensor).hex() != meant:
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
