"""Seconds a step of TRL's ``SDFTTrainer`` over ours: same model, threads, prompts, learning rate and lengths.

About 15 minutes. ``E2E_TRL=30,960`` in the environment takes only some of the contexts.
"""

from __future__ import annotations

import os
from typing import Any

from tests.benchmarks.e2e_runs import BATCH, Setting, context_text, figure, our_run, story_prompts
from tests.benchmarks.trl_runs import TrlSpec, trl_run

SETTINGS = {30: (Setting(30, 16), 1.0), 960: (Setting(960, 64), 2.2), 4096: (Setting(4096, 64), 8.0)}
"""By tokens of context: the lengths, and the least ratio."""

OUR_STEPS = {30: 8, 960: 4, 4096: 4}
THEIR_STEPS = {30: 8, 960: 3, 4096: 2}
MICRO_BATCH = {30: 16, 960: 4, 4096: 2}
"""Of theirs, in sequences: all logits of one are in memory at once."""


def run() -> dict[str, dict[str, Any]]:
    """The ratios of the contexts asked for."""
    chosen = os.environ.get("E2E_TRL", "30,960,4096").split(",")
    figures: dict[str, dict[str, Any]] = {}
    for tokens in map(int, chosen):
        setting, target = SETTINGS[tokens]
        ours = our_run(setting, OUR_STEPS[tokens])
        theirs = trl_run(
            TrlSpec(
                prompts=story_prompts(BATCH * THEIR_STEPS[tokens]),
                context=context_text(tokens),
                answer_tokens=setting.answer_tokens,
                steps=THEIR_STEPS[tokens],
                micro_batch=MICRO_BATCH[tokens],
            )
        )
        ratio = theirs.median_s / ours.step_s
        figures[f"e2e.trl_ratio_{tokens}"] = figure(
            ratio,
            "x",
            f">= {target}",
            ratio >= target,
            f"{BATCH} answers of at most {setting.answer_tokens} tokens a step under {tokens} of context: TRL "
            f"{theirs.median_s:.1f} s (median of {len(theirs.step_s) - 1}, {theirs.mean_tokens[-1]:.0f} tokens an "
            f"answer), ours {ours.step_s:.1f} s (median of {len(ours.steps) - 1}, {ours.mean_tokens:.0f} tokens; "
            f"{ours.stages()}); first steps left out, our context cache warm, one after the other",
        )
    return figures
