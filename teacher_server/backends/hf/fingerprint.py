"""Fingerprint of loaded weights."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

SAMPLES_PER_TENSOR = 64


def model_fingerprint(model: Any) -> str:
    """Hex sha256 of the configuration and of every tensor's name, shape, dtype and `SAMPLES_PER_TENSOR` values.

    The values are at even strides in the flattened tensor. The fingerprint tells models and checkpoints apart; it does
    not detect weights that someone changes on purpose.
    """
    digest = hashlib.sha256()
    config = model.config.to_dict()
    for volatile in ("_name_or_path", "transformers_version", "_attn_implementation", "dtype", "torch_dtype"):
        config.pop(volatile, None)
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().reshape(-1)
        stride = max(1, flat.numel() // SAMPLES_PER_TENSOR)
        sample = flat[::stride][:SAMPLES_PER_TENSOR].to(device="cpu", dtype=torch.float32)
        digest.update(sample.numpy().astype("<f4").tobytes())
    return digest.hexdigest()
