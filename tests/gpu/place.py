"""Where and how large: a check's device, sizes and scratch folder, and how it measures time and memory.

torch is imported inside functions: the process of a check imports this module before anything can fail.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.gpu.report import Figure

GIB = 1 << 30
SLACK_BYTES = 32 << 20
"""Added to limits of memory: cuBLAS and NCCL workspaces, and rounding."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Shape of a random Qwen3 model with a separate output layer."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of all checks."""

    scored: Shape
    """Model of the checks of the teacher and of log-probs."""
    trained: Shape
    """Model of the checks that train."""
    context_tokens: int
    prefill_tokens: int
    samples: int
    """Sequences of a batch."""
    oracle_samples: int
    """Sequences that a plain forward pass over the whole context also scores."""
    prompt_tokens: int
    response_tokens: int
    k: int
    steps: int
    micro_batch_tokens: int
    chunk_tokens: int
    """Positions whose logits are in memory at once."""
    head_vocabulary: int
    head_hidden: int
    head_tokens: int
    head_chunks: tuple[int, ...]
    head_oracle_tokens: int
    attention_tokens: int
    """Keys of the attention checks."""
    sync_timeout_s: float
    sync_bucket_bytes: int


FULL = Sizes(
    scored=Shape(1024, 28, 16, 8, 128, 3072, 151_936),  # as Qwen3-0.6B
    trained=Shape(1024, 12, 16, 8, 128, 3072, 32_768),
    context_tokens=16_384,
    prefill_tokens=8_192,
    samples=32,
    oracle_samples=4,
    prompt_tokens=64,
    response_tokens=192,
    k=256,
    steps=5,
    micro_batch_tokens=4_096,
    chunk_tokens=1_024,
    head_vocabulary=151_936,
    head_hidden=4_096,
    head_tokens=16_384,
    head_chunks=(256, 1_024, 4_096),
    head_oracle_tokens=512,
    attention_tokens=8_192,
    sync_timeout_s=20.0,
    sync_bucket_bytes=256 << 20,
)
SMALL = Sizes(
    scored=Shape(64, 2, 4, 2, 32, 128, 512),
    trained=Shape(64, 2, 4, 2, 32, 128, 512),
    context_tokens=96,
    prefill_tokens=40,
    samples=4,
    oracle_samples=4,
    prompt_tokens=6,
    response_tokens=24,
    k=16,
    steps=3,
    micro_batch_tokens=64,
    chunk_tokens=8,
    head_vocabulary=512,
    head_hidden=64,
    head_tokens=96,
    head_chunks=(8, 32),
    head_oracle_tokens=32,
    attention_tokens=80,
    sync_timeout_s=5.0,
    sync_bucket_bytes=1 << 15,
)
SIZES: Mapping[str, Sizes] = {"full": FULL, "small": SMALL}


@dataclass(frozen=True, slots=True)
class Place:
    """Device, sizes, and a scratch folder that all checks of one check-up share."""

    device: str
    """``cuda`` or ``cpu``."""
    sizes: Sizes
    folder: Path

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Place:
        """Build from plain values; `sizes` is a key of `SIZES`."""
        return cls(fields["device"], SIZES[fields["sizes"]], Path(fields["folder"]))

    @property
    def on_gpu(self) -> bool:
        """True on a GPU."""
        return self.device == "cuda"

    def synchronize(self) -> None:
        """Wait for the device."""
        import torch

        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], repeats: int = 1) -> float:
        """Measure the mean time of `work`, after it has run once."""
        work()
        self.synchronize()
        started = time.perf_counter()
        for _ in range(repeats):
            work()
        self.synchronize()
        return (time.perf_counter() - started) / repeats

    def seconds_once(self, work: Callable[[], object]) -> float:
        """Measure the time of `work`, which runs once."""
        self.synchronize()
        started = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - started

    def allocated(self) -> int:
        """Return the bytes of live tensors on the device; on CPU those that Python objects hold."""
        import torch

        gc.collect()
        if self.on_gpu:
            self.synchronize()
            return torch.cuda.memory_allocated()
        tensors = [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]
        dense = [tensor for tensor in tensors if tensor.device.type == "cpu" and tensor.layout == torch.strided]
        storages = [tensor.untyped_storage() for tensor in dense]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def peak_of(self, work: Callable[[], object]) -> int | None:
        """Run `work`; return the most bytes of tensors on the GPU meanwhile, above those before; None on CPU."""
        import torch

        if not self.on_gpu:
            work()
            return None
        before = self.allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        self.synchronize()
        return torch.cuda.max_memory_allocated() - before


def gib(name: str, measured: int | None, limit: float | None = None) -> Figure:
    """Figure of a size in bytes, with its limit in bytes."""
    return Figure(
        name, None if measured is None else measured / GIB, "GiB", at_most=None if limit is None else limit / GIB
    )


def free_memory() -> None:
    """Drop unreachable objects, and give this process's cached memory back to the GPU."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
