"""The simulator against this machine: fitted to one run, asked about two others, which are then run.

About six minutes on SmolLM2.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from deploy.simulator.file import load_simulation
from deploy.simulator.simulate import simulate
from tests.benchmarks.e2e_runs import Setting, folder_for, train, write_config
from tests.benchmarks.figures import Figure, Figures

STEPS = 9
"""Of each run, the first left out: lengths of 64 answers would differ by a sixth from run to run by chance."""
SETTING = Setting(context_tokens=30, answer_tokens=64)
SENTENCE = {"stop": ["."]}
"""Answers end with their sentence, so lengths differ, and with them how many are in flight."""

ASKED: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "a": ("twice as many prompts a step", {"rollout": {**SENTENCE, "batch_size": 32}}),
    "b": (
        "a third of the answer length, two samples a prompt, larger micro-batches",
        {
            "rollout": {**SENTENCE, "batch_size": 8, "samples_per_prompt": 2, "max_tokens": 20},
            "learner": {"micro_batch_tokens": 1024},
        },
    ),
}


def run() -> Figures:
    """``simulator.error_a`` and ``_b``."""
    with folder_for("simulator") as folder:
        return errors(folder)


def errors(folder: Path, **sections: dict[str, Any]) -> Figures:
    """Both errors; keyword arguments change all three runs."""
    fitted = write_config(folder / "fitted", SETTING, STEPS, **_with(sections, {"rollout": SENTENCE}))
    measured = train(fitted, folder / "fitted/run")
    figures: Figures = {}
    for name, (what, changes) in ASKED.items():
        config = write_config(folder / name, SETTING, STEPS, **_with(sections, changes))
        asked = load_simulation(config, ["simulation.steps=50"], folder / "fitted/run")
        predicted = simulate(asked.simulation)  # before the run: nothing of it can get in
        real = train(config, folder / name / "run")
        real_s = statistics.fmean(real.seconds())
        error = abs(predicted.step_s / real_s - 1)
        figures[f"simulator.error_{name}"] = Figure(
            error,
            "share",
            f"{what}: predicted {predicted.step_s:.2f} s a step, took {real_s:.2f} s (mean of {len(real.seconds())}; "
            f"{real.stages()}); fitted to a run of 16 prompts with {statistics.fmean(measured.seconds()):.2f} s a step "
            f"({measured.stages()})",
            at_most=0.2,
        )
    return figures


def _with(sections: dict[str, dict[str, Any]], changes: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {key: {**sections.get(key, {}), **changes.get(key, {})} for key in {**sections, **changes}}
