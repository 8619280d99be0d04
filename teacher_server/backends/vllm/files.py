"""Fingerprint of a model's files, for an engine that holds its weights in other processes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from teacher_server.backends.base import BackendError
from teacher_server.backends.hf.fingerprint import SAMPLES_PER_TENSOR

HEADER_BYTES = 100 * 1024 * 1024
"""Maximum header size of the safetensors format."""


def model_folder(model: str) -> Path:
    """Folder of a model path or hub name, downloaded if missing. Raises BackendError."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=["*.safetensors", "*.json"]))
    except (OSError, ValueError) as error:
        raise BackendError(f"{model} is neither a folder nor a model that the hub returns: {error}") from error


def weights_fingerprint(folder: Path) -> str:
    """Hex sha256 of the configuration and of every tensor's name, shape, dtype and `SAMPLES_PER_TENSOR` samples of 8
    bytes at even strides. It differs from the transformers backend's fingerprint, which reads loaded weights.

    Raises BackendError if there are no safetensors files.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise BackendError(f"{folder} holds no safetensors files: convert the model (save_pretrained)")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for volatile in ("_name_or_path", "transformers_version"):
        config.pop(volatile, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for line, sample in sorted(entry for file in files for entry in _tensors(file)):
        digest.update(line.encode())
        digest.update(sample)
    return digest.hexdigest()


def _tensors(file: Path) -> list[tuple[str, bytes]]:
    data = np.memmap(file, dtype=np.uint8, mode="r")
    length = int.from_bytes(data[:8].tobytes(), "little")
    if length > min(HEADER_BYTES, data.size - 8):
        raise BackendError(f"{file} is not a safetensors file")
    header = json.loads(data[8 : 8 + length].tobytes())
    tensors = []
    for name, tensor in header.items():
        if name == "__metadata__":
            continue
        begin, end = (8 + length + offset for offset in tensor["data_offsets"])
        offsets = np.linspace(begin, max(begin, end - 8), SAMPLES_PER_TENSOR).astype(np.int64)
        sample = b"".join(data[offset : min(offset + 8, end)].tobytes() for offset in offsets)
        tensors.append((f"{name} {tensor['shape']} {tensor['dtype']}", sample))
    return tensors
