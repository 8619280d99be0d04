"""Resident memory of a rank on CPU while it trains two steps: ``python -m tests.support.rank_memory``, JSON in, out.

Each rank is a new process: memory that an earlier model freed would hide what this one takes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PROMPT_TOKENS, RESPONSE_TOKENS, ANSWERS, K = 8, 56, 4, 16


def measure(model: Path, learner: dict[str, Any], dtype: str, world_size: int = 1) -> dict[str, int]:
    """Bytes of rank 0: ``base`` before the model, ``loaded`` after, ``peak`` in the second step, ``state`` on disk."""
    from learner.trainer.distributed import free_port

    with tempfile.TemporaryDirectory(prefix="rank-memory-") as folder:
        task = {"model": str(model), "learner": learner, "dtype": dtype, "world": world_size, "port": free_port()}
        command = [sys.executable, "-m", "tests.support.rank_memory"]
        ranks = [
            subprocess.Popen(
                [*command, json.dumps({**task, "rank": rank, "state": folder})], stdout=subprocess.PIPE, text=True
            )
            for rank in range(world_size)
        ]
        try:
            outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        if any(rank.returncode for rank in ranks):
            raise RuntimeError(f"a rank failed: {[rank.returncode for rank in ranks]}")
        figures: dict[str, int] = json.loads(outputs[0].splitlines()[-1])
        figures["state"] = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        return figures


def main(task: dict[str, Any]) -> None:
    """One rank."""
    import torch

    from learner.trainer.distributed import join_ranks
    from learner.trainer.engine import LearnerEngine
    from tests.support.memory import peak_bytes, reset_peak
    from tests.support.scored import learner_config, make_scored

    torch.set_num_threads(1)
    join_ranks(task["rank"], task["world"], "127.0.0.1", task["port"], torch.device("cpu"), 200.0)
    scored = make_scored(
        ANSWERS,
        k=K,
        seed=task["rank"],
        prompt_tokens=(PROMPT_TOKENS, PROMPT_TOKENS + 1),
        response_tokens=(RESPONSE_TOKENS, RESPONSE_TOKENS + 1),
    )
    figures = {"base": reset_peak()}
    config = learner_config(Path(task["model"]), learner=task["learner"], student={"dtype": task["dtype"]})
    engine = LearnerEngine(config)
    figures["loaded"] = reset_peak()
    for _ in range(2):
        reset_peak()
        engine.accumulate(scored)
        figures["passes"] = peak_bytes()
        engine.finish_step(ANSWERS * RESPONSE_TOKENS * task["world"], ANSWERS * task["world"])
        figures["peak"] = peak_bytes()
    engine.save_state(Path(task["state"]))
    print(json.dumps(figures))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
