"""Resident memory of a rank on CPU while it trains two steps: ``python -m tests.support.rank_memory``, JSON in, out.

Each rank is a new process: memory that an earlier model freed would hide what this one takes.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PROMPT_TOKENS, RESPONSE_TOKENS, K = 8, 16, 16


def measure(model: Path, learner: dict[str, Any], dtype: str, world_size: int = 1) -> dict[str, int]:
    """Bytes of rank 0 over those of a tiny model's rank: ``loaded``, ``passes`` and ``peak`` of the second step.

    ``state`` is the size of a checkpoint on disk.
    """
    from learner.trainer.distributed import free_port

    with tempfile.TemporaryDirectory(prefix="rank-memory-") as folder:
        task = {"model": str(model), "learner": learner, "dtype": dtype, "world": world_size, "port": free_port()}
        command = [sys.executable, "-m", "tests.support.rank_memory"]
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # the allocator keeps no tensor that is freed
        ranks = [
            subprocess.Popen(
                [*command, json.dumps({**task, "rank": rank, "state": folder})],
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for rank in range(world_size)
        ]
        try:
            outputs = [rank.communicate(timeout=900)[0] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        if any(rank.returncode for rank in ranks):
            raise RuntimeError(f"a rank failed: {[rank.returncode for rank in ranks]}")
        figures: dict[str, int] = json.loads(outputs[0].splitlines()[-1])
        figures["state"] = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        return figures


def main(task: dict[str, Any]) -> None:
    """One rank. A tiny model takes a step first, so that libraries and their buffers are there."""
    import torch

    from learner.trainer.distributed import join_ranks
    from tests.support.tiny import make_tiny_model

    torch.set_num_threads(1)
    tiny = make_tiny_model(Path(task["state"]) / f"tiny-{task['rank']}")  # in a group, only rank 0 would save it
    join_ranks(task["rank"], task["world"], "127.0.0.1", task["port"], torch.device("cpu"), 800.0)
    _train(tiny, task)
    shutil.rmtree(tiny)
    gc.collect()
    figures = _train(Path(task["model"]), task, state=Path(task["state"]) / "state")
    print(json.dumps(figures))


def _train(model: Path, task: dict[str, Any], state: Path | None = None) -> dict[str, int]:
    from learner.trainer.engine import LearnerEngine
    from tests.support.memory import peak_bytes, reset_peak
    from tests.support.scored import learner_config, make_scored

    scored = make_scored(
        1,
        k=K,
        seed=task["rank"],
        prompt_tokens=(PROMPT_TOKENS, PROMPT_TOKENS + 1),
        response_tokens=(RESPONSE_TOKENS, RESPONSE_TOKENS + 1),
    )
    base = reset_peak()
    engine = LearnerEngine(learner_config(model, learner=task["learner"], student={"dtype": task["dtype"]}))
    figures = {"loaded": reset_peak() - base}
    for _ in range(2):
        reset_peak()
        engine.accumulate(scored)
        figures["passes"] = peak_bytes() - base
        engine.finish_step(RESPONSE_TOKENS * task["world"], task["world"])
        figures["peak"] = peak_bytes() - base
    if state is not None:
        engine.save_state(state)
    return figures


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
