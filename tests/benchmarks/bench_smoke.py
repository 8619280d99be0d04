"""Figures that hold on any machine, in small sizes: ratios of one run, bytes and counts. No model is needed.

Meant to take at most five minutes on two cores: ``make bench-smoke``. Seconds and rates are left out,
because a machine of continuous integration may be four times slower than the one that the targets were set on.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from tests.benchmarks import bench_learner, bench_loop, bench_sync, bench_teacher
from tests.benchmarks.figures import THREADS, Figures
from tests.support.tiny import make_tiny_model


def run() -> Figures:
    """Figures of other benchmarks, under their names after ``smoke.``: their sizes differ, so the history does too."""
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory(prefix="bench-smoke-") as folder:
        figures = {
            **bench_teacher.bytes_per_token(),
            **bench_learner.loss_peak(width=64),
            **bench_learner.loss_time(tokens=512, width=256),
            **bench_learner.shared_passes(),
            **bench_sync.delta_bytes(make_tiny_model(Path(folder) / "tiny", hidden=256)),
            **bench_loop.overlap(),
        }
    return {f"smoke.{name}": figure for name, figure in figures.items()}
