"""Memory of the driver over a long run: 200 steps of 1,024 answers over stubs, about ten minutes."""

from __future__ import annotations

import statistics

from tests.benchmarks.figures import Figure, Figures
from tests.benchmarks.stub_services import Latencies, stub_config
from tests.benchmarks.stub_steps import run_steps

STEPS, ANSWERS, WARM = 200, 1024, 40


def run(steps: int = STEPS, warm: int = WARM) -> Figures:
    """Bytes that the driver keeps of each answer, by the slope of its resident memory over the steps after `warm`."""
    config = stub_config(
        rollout={"batch_size": ANSWERS, "concurrency": 512},
        learner={"micro_batch_tokens": 8192, "steps": steps},
        loss={"top_k": 1},
    )
    resident = [step.resident_bytes for step in run_steps(config, Latencies(ANSWERS), steps)[warm:]]
    slope = statistics.linear_regression(range(len(resident)), resident).slope
    return {
        "loop.driver_bytes_per_answer": Figure(
            slope / ANSWERS,
            "bytes",
            f"resident memory of the driver after steps {warm} to {steps} of {ANSWERS} answers: "
            f"{resident[0] / 1e6:.1f} to {resident[-1] / 1e6:.1f} MB",
            at_most=16,
            limit="0: an answer leaves nothing",
        )
    }
