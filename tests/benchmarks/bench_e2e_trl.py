"""Seconds a step of TRL's ``SDFTTrainer`` over ours: same model, threads, prompts, learning rate and lengths.

About 15 minutes. ``E2E_TRL=30,960`` in the environment takes only some of the contexts.
"""

from __future__ import annotations

import os
from statistics import median

from tests.benchmarks.e2e_runs import BATCH, Setting, context_text, our_run, story_prompts
from tests.benchmarks.figures import Figure, Figures
from tests.benchmarks.trl_runs import TrlSpec, trl_run

SETTINGS = {30: (Setting(30, 16), 1.0), 960: (Setting(960, 64), 2.2), 4096: (Setting(4096, 64), 8.0)}
"""By tokens of context: the lengths, and the least ratio."""

ROUNDS = {30: 2, 960: 1, 4096: 1}
"""Of one run of ours and one of theirs each: a machine may change between two runs by more than short steps differ."""
OUR_STEPS = {30: 6, 960: 4, 4096: 4}
THEIR_STEPS = {30: 6, 960: 3, 4096: 2}
MICRO_BATCH = {30: 16, 960: 4, 4096: 2}
"""Of theirs, in sequences: all logits of one are in memory at once."""


def run() -> Figures:
    """The ratios of the contexts asked for."""
    chosen = os.environ.get("E2E_TRL", "30,960,4096").split(",")
    figures: Figures = {}
    for tokens in map(int, chosen):
        setting, target = SETTINGS[tokens]
        spec = TrlSpec(
            prompts=story_prompts(BATCH * THEIR_STEPS[tokens]),
            context=context_text(tokens),
            answer_tokens=setting.answer_tokens,
            steps=THEIR_STEPS[tokens],
            micro_batch=MICRO_BATCH[tokens],
        )
        pairs = [(our_run(setting, OUR_STEPS[tokens]), trl_run(spec)) for _ in range(ROUNDS[tokens])]
        our_steps = [seconds for ours, _ in pairs for seconds in ours.seconds()]
        their_steps = [seconds for _, theirs in pairs for seconds in theirs.step_s[1:]]
        ratio = median(their_steps) / median(our_steps)
        ours, theirs = pairs[-1]
        figures[f"e2e.trl_ratio_{tokens}"] = Figure(
            ratio,
            "x",
            f"{BATCH} answers of at most {setting.answer_tokens} tokens a step under {tokens} of context: TRL "
            f"{median(their_steps):.1f} s (median of {len(their_steps)}, {theirs.mean_tokens[-1]:.0f} tokens an "
            f"answer), ours {median(our_steps):.1f} s (median of {len(our_steps)}, {ours.mean_tokens:.0f} tokens; "
            f"{ours.stages()}); first steps of a run left out, our context cache warm, in turns",
            at_least=target,
        )
    return figures
