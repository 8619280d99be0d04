"""What a long context costs a step once its cache is warm, and how long a step pauses for new weights."""

from __future__ import annotations

from typing import Any

from tests.benchmarks.e2e_runs import Setting, figure, our_run

STEPS = 4


def run() -> dict[str, dict[str, Any]]:
    """Both figures, from runs that follow each other; about six minutes."""
    runs = {tokens: our_run(Setting(tokens, 64), STEPS) for tokens in (30, 960, 4096)}
    short, middle, long = runs[30], runs[960], runs[4096]
    growth = long.step_s / short.step_s
    prefill_s = max(0.0, long.first_extra_s - short.first_extra_s)
    share = middle.share("sync")
    return {
        "e2e.context_growth": figure(
            growth,
            "x",
            "<= 1.3",
            growth <= 1.3,
            f"medians of {STEPS - 1} steps of 16 answers: {long.step_s:.1f} s under 4,096 tokens of context "
            f"({long.stages()}; {long.mean_tokens:.0f} tokens an answer), {short.step_s:.1f} s under 30 "
            f"({short.stages()}; {short.mean_tokens:.0f} tokens); the first step, which computes the context once, "
            f"took {prefill_s:.1f} s more",
        ),
        "loop.sync_share": figure(
            share,
            "share",
            "<= 0.05",
            share <= 0.05,
            f"of {STEPS - 1} steps of 16 answers of 64 tokens under 960 tokens of context, {middle.step_s:.1f} s each "
            f"({middle.stages()})",
        ),
    }
