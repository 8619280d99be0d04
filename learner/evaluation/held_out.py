"""Held-out evaluation of a run: accuracy before, after, with the context and on other tasks; perplexity of texts."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any

from common.async_utils import run_in_background
from common.config.model import Config
from common.evaluation.accuracy import Accuracy, change
from common.evaluation.pass_at_k import pass_at
from common.evaluation.perplexity import Perplexity, perplexity
from common.protocol.schema import Prompt
from common.telemetry.run_files import Progress, RunFiles, write_json
from learner.cluster.services import Services
from learner.data.inputs import Inputs
from learner.evaluation.evaluate import evaluate_rows
from learner.evaluation.summary import RunSummary

ROW_SCORES_FILE = "accuracy.json"
"""File in the run's folder: set -> row id -> share of right answers."""


TAUGHT = ("in_context", "valid", "final")
"""Evaluations whose answers should end: with the context, or after training. An untrained student without the context
may not know yet where an answer ends."""
MANY_CUT = 0.5
"""Share of answers that reach the limit of tokens, above which a warning says so."""
WORTHWHILE_GAP = 0.05
"""A gap between accuracies of which even the interval's upper end is below this is nothing to distil."""


class HeldOutEvaluator:
    """Evaluates one run and stores the results in its `RunSummary`."""

    def __init__(
        self,
        config: Config,
        services: Services,
        inputs: Inputs,
        files: RunFiles,
        progress: Progress,
        summary: RunSummary,
        keep_workers: Callable[[int], Coroutine[Any, Any, None]],
    ) -> None:
        """`keep_workers(step)` replaces lost workers while an evaluation runs."""
        self._config = config
        self._services = services
        self._inputs = inputs
        self._files = files
        self._progress = progress
        self._summary = summary
        self._keep_workers = keep_workers

    async def in_context(self) -> None:
        """Measure accuracy with the context in the prompt: the level that the student should reach without it.

        Not measured if a row of ``data.eval`` lacks a context.
        """
        if not self._inputs.has_context_for_eval:
            return
        self._summary.in_context = await self.accuracy("in_context", 0, self._inputs.eval, with_context=True)

    async def before(self) -> None:
        """Measure the initial weights without the context."""
        summary = self._summary
        summary.base = await self.accuracy("base", 0, self._inputs.eval)
        summary.ood_before = await self._other_tasks(0)
        summary.perplexity_before = await self._perplexities(0)

    async def after(self, step: int) -> None:
        """Measure the final weights without the context, and write all row scores."""
        summary = self._summary
        summary.final = await self.accuracy("final", step, self._inputs.eval)
        summary.ood_after = await self._other_tasks(step)
        summary.perplexity_after = await self._perplexities(step)
        write_json(self._config.run.path / ROW_SCORES_FILE, summary.row_scores())

    def warn_if_no_gap(self) -> None:
        """Warn if the context does not raise accuracy, or if too few rows were asked to tell."""
        base, in_context = self._summary.base, self._summary.in_context
        if base is not None and in_context is not None and (warning := gap_warning(base, in_context)) is not None:
            self._progress.line(f"WARNING: {warning}")

    def _warn_if_cut(self, name: str, share: float) -> None:
        if name in TAUGHT and share > MANY_CUT:
            limit = self._config.eval.max_tokens or self._config.rollout.max_tokens
            self._progress.line(
                f"WARNING: {share:.0%} of the answers of {name} did not end within {limit} tokens: raise "
                "eval.max_tokens or rollout.max_tokens, or set rollout.stop"
            )

    async def accuracy(
        self, name: str, step: int, rows: Sequence[Prompt], *, with_context: bool = False
    ) -> Accuracy | None:
        """Accuracy of the engines' current weights on `rows`; None if `rows` is empty."""
        if not rows:
            return None
        started = time.time()
        self._progress.status(f"evaluating: {name}, {len(rows)} rows")
        async with run_in_background(self._keep_workers(step)):
            result = await evaluate_rows(
                self._services,
                self._config,
                self._inputs,
                rows,
                name,
                step,
                self._files,
                with_context,
                partial(self._warn_if_cut, name),
            )
        self._summary.add_seconds({"evaluation": time.time() - started})
        self._files.end_of_samples(step, name)
        at_k = {f"pass_at_{k}/{name}": found["value"] for k, found in pass_at(result).items()}
        self._files.metrics(step, {f"accuracy/{name}": result.accuracy, **at_k})
        self._progress.line(accuracy_line(name, result))
        return result

    async def _other_tasks(self, step: int) -> dict[str, Accuracy]:
        results = {}
        for name, rows in self._inputs.ood.items():
            found = await self.accuracy(f"ood/{name}", step, rows)
            assert found is not None
            results[name] = found
        return results

    async def _perplexities(self, step: int) -> dict[str, Perplexity]:
        results = {}
        for name, chunks in self._inputs.texts.items():
            started = time.time()
            self._progress.status(f"perplexity: {name}, {len(chunks)} chunks")
            found = results[name] = perplexity(await self._services.probe_learner(chunks))
            self._summary.add_seconds({"evaluation": time.time() - started})
            self._files.metrics(step, {f"nats_per_token/{name}": found.nats})
            self._progress.line(f"text {name:<15} {found.nats:.4f} nats a token ({found.tokens} tokens)")
        return results


def accuracy_line(name: str, result: Accuracy) -> str:
    """One line of progress."""
    (low, high), answers = result.ci95, f" x {result.samples}" if result.samples > 1 else ""
    return f"accuracy {name:<11} {result.accuracy:.3f} ({low:.3f} to {high:.3f}, n = {result.n}{answers})"


def gap_warning(base: Accuracy, in_context: Accuracy) -> str | None:
    """Explain that there is nothing to distil, or that the rows cannot tell; None if the context helps."""
    gap = change(base, in_context)
    low, high = gap.ci95
    found = (
        f"{in_context.accuracy:.3f} right with the context, {base.accuracy:.3f} without, a gap of {gap.change:+.3f} "
        f"({low:+.3f} to {high:+.3f}, n = {base.n})"
    )
    if high < WORTHWHILE_GAP:
        return f"there is nothing to distil: {found}; try another context"
    if gap.covers_zero:
        return f"{base.n} rows cannot tell whether there is anything to distil: {found}; use more rows in data.eval"
    return None
