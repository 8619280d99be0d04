"""What a long context costs a step once its cache is warm, and how long a step pauses for new weights."""

from __future__ import annotations

from tests.benchmarks.e2e_runs import Setting, our_run
from tests.benchmarks.figures import Figure, Figures

STEPS = 4


def run() -> Figures:
    """Both figures, from runs that follow each other; about six minutes."""
    runs = {tokens: our_run(Setting(tokens, 64), STEPS) for tokens in (30, 960, 4096)}
    short, middle, long = runs[30], runs[960], runs[4096]
    growth = long.step_s / short.step_s
    prefill_s = max(0.0, long.first_extra_s - short.first_extra_s)
    share = middle.share("sync")
    return {
        "e2e.context_growth": Figure(
            growth,
            "x",
            f"medians of {STEPS - 1} steps of 16 answers: {long.step_s:.1f} s under 4,096 tokens of context "
            f"({long.stages()}; {long.mean_tokens:.0f} tokens an answer), {short.step_s:.1f} s under 30 "
            f"({short.stages()}; {short.mean_tokens:.0f} tokens); the first step, which computes the context once, "
            f"took {prefill_s:.1f} s more",
            at_most=1.3,
        ),
        "loop.sync_share": Figure(
            share,
            "share",
            f"of {STEPS - 1} steps of 16 answers of 64 tokens under 960 tokens of context, {middle.step_s:.1f} s each "
            f"({middle.stages()})",
            at_most=0.05,
        ),
    }
