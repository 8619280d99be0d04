"""Seconds of training to 0.9 of the teacher's accuracy on the demo task: TRL's ``SDFTTrainer`` over ours.

About 15 minutes, so it is run by name only: ``make bench ONLY=e2e_accuracy``.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass

from tests.benchmarks.e2e_runs import BATCH, DEMO, ROOT, folder_for, train
from tests.benchmarks.figures import Figure, Figures
from tests.benchmarks.trl_runs import TrlSpec, trl_run

SEEDS, STEPS, EVERY = (0, 1, 2), 30, 2
ANSWER_TOKENS, LEARNING_RATE = 6, 2e-5


@dataclass(frozen=True)
class Reached:
    """Training seconds until a check found enough, and the step; where none did, all seconds and None."""

    seconds: float
    step: int | None

    def __str__(self) -> str:
        return f"{self.seconds:.0f} s ({'never' if self.step is None else f'step {self.step}'})"


def reached(step_s: list[float], accuracy: dict[int, float], enough: float) -> Reached:
    """`step_s` of steps 1, 2, …; `accuracy` by step."""
    step = next((step for step, value in sorted(accuracy.items()) if value >= enough), None)
    return Reached(sum(step_s[:step]), step)


def ours(seed: int) -> tuple[Reached, float]:
    """Of a run of the demo; and the accuracy that is enough."""
    with folder_for(f"demo-{seed}") as folder:
        overrides = [
            f"run.dir={folder}",
            f"run.seed={seed}",
            f"learner.steps={STEPS}",
            f"learner.lr={LEARNING_RATE}",
            f"eval.every={EVERY}",
        ]
        steps = train(ROOT / "deploy/configs/demo.yaml", folder / "demo", overrides)
        lines = [json.loads(line) for line in (folder / "demo/metrics.jsonl").read_text().splitlines()]
    enough = 0.9 * next(line["accuracy/in_context"] for line in lines if "accuracy/in_context" in line)
    accuracy = {line["step"]: line["accuracy/valid"] for line in lines if "accuracy/valid" in line}
    return reached([step["time/total_s"] for step in steps.steps], accuracy, enough), enough


def theirs(seed: int, enough: float) -> Reached:
    """Of TRL on the same rows and checks."""
    rows = {
        name: [json.loads(line) for line in (DEMO / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "valid")
    }
    spec = TrlSpec(
        prompts=[row["prompt"] for row in rows["train"]],
        context=(DEMO / "context.txt").read_text(),
        answer_tokens=ANSWER_TOKENS,
        steps=STEPS,
        micro_batch=BATCH,
        lr=LEARNING_RATE,
        seed=seed,
        newline_ends=True,
        check_every=EVERY,
        checked=tuple((row["prompt"], row["answer"]) for row in rows["valid"]),
        enough=enough,
    )
    run = trl_run(spec)
    return reached(run.step_s, run.accuracy, enough)


def run() -> Figures:
    """The ratio of the medians over the seeds; 0 if a run of ours never got there, however long TRL took."""
    pairs = []
    for seed in SEEDS:
        us, enough = ours(seed)
        pairs.append((us, theirs(seed, enough)))
    ratio = statistics.median(them.seconds for _, them in pairs) / statistics.median(us.seconds for us, _ in pairs)
    if any(us.step is None for us, _ in pairs):
        ratio = 0.0
    told = "; ".join(f"seed {seed}: ours {us}, TRL {them}" for seed, (us, them) in zip(SEEDS, pairs, strict=True))
    return {
        "e2e.time_to_accuracy_ratio": Figure(
            ratio,
            "x",
            f"training seconds (no start-up, no checks) until held-out accuracy, looked at every {EVERY} steps, is 0.9 "
            f"of the teacher's in context: medians of {len(SEEDS)} seeds; {told}",
            at_least=1,
        )
    }
