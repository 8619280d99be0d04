"""The demo's whole run in bfloat16."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.gpu.place import Place
from tests.gpu.report import Figure

ROOT = Path(__file__).parents[3]
CONFIG = "deploy/configs/demo.yaml"


def overrides(folder: Path, gpus: int) -> list[str]:
    """Settings of the run: its three services have a GPU each, or a part of one."""
    share = 1 if gpus >= 3 else 0.3
    return [
        f"run.dir={folder}",
        "student.dtype=bfloat16",
        f"learner.gpus_per_rank={share}",
        f"rollout.gpus_per_worker={share}",
        f"teacher.gpus={share}",
    ]


def demo(place: Place) -> Iterator[Figure]:
    """Run `opcd train` to its end; needs models/smollm2, which `make demo` prepares."""
    import torch

    if not (ROOT / "models/smollm2/config.json").is_file():
        raise FileNotFoundError("models/smollm2 is missing: opcd prepare smollm2 --out models/smollm2")
    folder = place.folder / "runs"
    command = [sys.executable, "-m", "deploy.cli.main", "train", CONFIG]
    began = time.monotonic()
    settings = overrides(folder, torch.cuda.device_count())
    status = subprocess.run([*command, *settings], cwd=ROOT, check=False).returncode
    yield Figure("exit status", status, at_least=0, at_most=0)
    yield Figure("time", time.monotonic() - began, "s")
    (written,) = folder.glob("*/summary.json")
    summary = json.loads(written.read_text())
    yield Figure("finished", float(summary["outcome"] == "finished"), at_least=1)
    yield Figure("steps", summary["steps"])
