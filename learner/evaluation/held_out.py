"""What a run is judged by: accuracy before and after, in context, on other tasks, and how well texts are predicted."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from common.async_utils import run_in_background
from common.config.model import Config
from common.evaluation.accuracy import Accuracy, change
from common.evaluation.perplexity import perplexity
from common.protocol.schema import Prompt
from common.telemetry.run_files import Progress, RunFiles, write_json
from learner.cluster.services import Services
from learner.data.inputs import Inputs
from learner.evaluation.evaluate import evaluate_rows
from learner.evaluation.summary import RunSummary

ROWS = "accuracy.json"
"""Of a run's folder: set -> row id -> the row's share of right answers."""


class HeldOut:
    """Evaluates one run and keeps what came out in its tally."""

    def __init__(
        self,
        config: Config,
        services: Services,
        inputs: Inputs,
        files: RunFiles,
        progress: Progress,
        tally: RunSummary,
        keep_workers: Callable[[int], Coroutine[Any, Any, None]],
    ) -> None:
        """`keep_workers`: what runs beside an evaluation at a step, so that lost workers are replaced."""
        self._config = config
        self._services = services
        self._inputs = inputs
        self._files = files
        self._progress = progress
        self._tally = tally
        self._keep_workers = keep_workers

    async def in_context(self) -> None:
        """Accuracy of the engines' weights under the context: what the student is to become."""
        self._tally.in_context = await self.accuracy("in_context", 0, self._inputs.eval, with_context=True)

    async def before(self) -> None:
        """Everything that is reported without the context, of the initial weights."""
        tally = self._tally
        tally.base = await self.accuracy("base", 0, self._inputs.eval)
        tally.ood_before = await self._elsewhere(0)
        tally.perplexity_before = await self._texts(0)

    async def after(self, step: int) -> None:
        """The same of the final weights, once."""
        tally = self._tally
        tally.final = await self.accuracy("final", step, self._inputs.eval)
        tally.ood_after = await self._elsewhere(step)
        tally.perplexity_after = await self._texts(step)
        write_json(self._config.run.path / ROWS, tally.row_scores())

    def warn_of_no_gap(self) -> None:
        """Say it where the context does not change the accuracy: there is nothing to distil then."""
        base, in_context = self._tally.base, self._tally.in_context
        if base is None or in_context is None:
            return
        gap = change(base, in_context)
        if gap.covers_zero or gap.change <= 0:
            low, high = gap.ci95
            self._progress.line(
                f"WARNING: there is nothing to distil: {in_context.accuracy:.3f} right with the context, "
                f"{base.accuracy:.3f} without, a gap of {gap.change:+.3f} ({low:+.3f} to {high:+.3f}, n = {base.n}); "
                "try another context, or more rows in data.eval"
            )

    async def accuracy(
        self, name: str, step: int, rows: Sequence[Prompt], *, with_context: bool = False
    ) -> Accuracy | None:
        """Accuracy of the engines' current weights on `rows`, None where there are none; every answer goes to
        ``samples.jsonl``.
        """
        if not rows:
            return None
        started = time.time()
        self._progress.status(f"evaluating: {name}, {len(rows)} rows")
        async with run_in_background(self._keep_workers(step)):
            result = await evaluate_rows(
                self._services, self._config, self._inputs, rows, name, step, self._files, with_context
            )
        self._tally.add_seconds({"evaluation": time.time() - started})
        self._files.metrics(step, {f"accuracy/{name}": result.accuracy})
        self._progress.line(accuracy_line(name, result))
        return result

    async def _elsewhere(self, step: int) -> dict[str, Accuracy]:
        results = {}
        for name, rows in self._inputs.ood.items():
            found = await self.accuracy(f"ood/{name}", step, rows)
            assert found is not None
            results[name] = found
        return results

    async def _texts(self, step: int) -> dict[str, Any]:
        results = {}
        for name, chunks in self._inputs.texts.items():
            started = time.time()
            self._progress.status(f"perplexity: {name}, {len(chunks)} chunks")
            found = results[name] = perplexity(await self._services.probe_learner(chunks))
            self._tally.add_seconds({"evaluation": time.time() - started})
            self._files.metrics(step, {f"nats_per_token/{name}": found.nats})
            self._progress.line(f"text {name:<15} {found.nats:.4f} nats a token ({found.tokens} tokens)")
        return results


def accuracy_line(name: str, result: Accuracy) -> str:
    """One line of progress."""
    (low, high), answers = result.ci95, f" x {result.samples}" if result.samples > 1 else ""
    return f"accuracy {name:<11} {result.accuracy:.3f} ({low:.3f} to {high:.3f}, n = {result.n}{answers})"
