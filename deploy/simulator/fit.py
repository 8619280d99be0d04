"""How fast the parts of a run were, from what it left behind.

Each part is fitted with the simulator's own model of it, so a simulated run gives back what it was made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.config.model import Config
from common.telemetry.intervals import Interval
from deploy.simulator.config import (
    SimulatedLearner,
    SimulatedRollout,
    SimulatedSync,
    SimulatedTeacher,
    SimulationConfig,
    Spread,
)
from deploy.simulator.run import F64, Measured, by_own_clocks, measured

SHAPE_POINTS = 64
"""Values that an observed distribution is kept as, at most."""

FLAT = 0.02
"""Relative difference in how well two contentions explain the answers below which they explain them equally well."""

CONTENTIONS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0)
"""That are tried for each interference."""


@dataclass(frozen=True)
class Fit:
    """A simulation like the measured run, and what could not be told from it."""

    simulation: SimulationConfig
    notes: tuple[str, ...]


def fit(folder: Path) -> Fit:
    """The simulation of the run in `folder`. Raises ConfigError where it left nothing to fit."""
    return fitted(measured(folder))


def fitted(run: Measured) -> Fit:
    """The simulation of a measured run."""
    config, notes = run.config, []
    interference = _interference(run)
    run = by_own_clocks(run, interference)
    token_s, contention, answer_s, varied = _rollout(run)
    if not varied:
        notes.append(
            "every answer had as many others beside it as any other: how they slow each other down could not be told, "
            "and rollout.token_s is what it was in that company"
        )
    tokens = np.array([answer.response_tokens for answer in run.answers], np.float64)
    rate, request_s = _teacher(run)
    micro_batch_s, second_per_token = _line(*_micro_batches(run))
    simulation = SimulationConfig(
        **sizes(config),
        prompt_tokens=round(float(np.mean([answer.prompt_tokens for answer in run.answers]))),
        loop_s=float(np.mean(run.loop_s)),
        interference=interference,
        rollout=SimulatedRollout(
            workers=config.rollout.workers,
            concurrency=min(config.rollout.concurrency, config.rollout.max_num_seqs),
            answer_tokens=spread_of(tokens),
            token_s=token_s,
            contention=contention,
            answer_s=answer_s,
        ),
        teacher=SimulatedTeacher(
            tokens_per_s=rate,
            request_s=request_s,
            batch_tokens=config.teacher.batch_tokens,
            window_s=config.teacher.batch_window_ms / 1000,
        ),
        learner=SimulatedLearner(
            ranks=config.learner.ranks,
            tokens_per_s=1 / second_per_token,
            micro_batch_tokens=config.learner.micro_batch_tokens,
            packed=config.learner.packing != "off",
            micro_batch_s=micro_batch_s,
            step_s=float(np.mean([end - start for start, end in run.steps])),
        ),
        sync=SimulatedSync(seconds=float(np.mean(run.sync_s)), parity_s=float(np.mean(run.parity_s))),
    )
    return Fit(simulation, tuple(notes))


def sizes(config: Config) -> dict[str, int]:
    """What a run's configuration says of the simulation's top level."""
    return {
        "steps": config.learner.steps,
        "samples_per_step": config.rollout.batch_size * config.rollout.samples_per_prompt,
        "max_staleness": config.rollout.max_staleness,
    }


# --- fitting --------------------------------------------------------------------------------------------------------


def _interference(run: Measured) -> float:
    """What explains best how long answers and micro-batches took, of those that others were beside and of the rest;
    0 where it makes no difference.
    """

    def misfit(interference: float) -> float:
        own = by_own_clocks(run, interference)
        tokens, seconds = _micro_batches(own)
        batch_s, token_s = _line(tokens, seconds)
        learner = float(np.sqrt(np.mean((seconds - batch_s - token_s * tokens) ** 2)) / np.mean(seconds))
        crowded = _Crowds(own)
        return learner + min(crowded.misfit(float(contention)) for contention in CONTENTIONS)

    grid = np.linspace(0.0, 1.0, 21)
    values = np.array([misfit(float(point)) for point in grid])
    best = int(np.argmin(values))
    return float(grid[best]) if values[0] - values[best] > FLAT else 0.0


def _rollout(run: Measured) -> tuple[Spread, float, float, bool]:
    """(seconds a token of an answer alone, contention, seconds an answer, whether contention could be told).

    For a given contention, the time each answer had the worker to itself follows from who was beside it when, and is
    answer_s + tokens · token_s. The contention is the one at which that fits best.
    """
    crowds = _Crowds(run)
    contention, varied = _lowest(crowds.misfit, 0.0, 1.0)
    if not varied:
        contention = 0.0
    own = crowds.alone(contention)
    answer_s, token_s = _line(crowds.tokens, own)
    ratios = own / (answer_s + crowds.tokens * token_s)
    return spread_of(ratios, token_s), contention, answer_s, varied


class _Crowds:
    """The answers to fit and who was beside each in its worker."""

    def __init__(self, run: Measured) -> None:
        workers = {answer.worker for answer in run.everyone}
        self._answers = run.answers
        self._of = {w: _Crowd([a.rollout for a in run.everyone if a.worker == w], run.syncs) for w in workers}
        self.tokens = np.array([answer.response_tokens for answer in run.answers], np.float64)

    def alone(self, contention: float) -> F64:
        """Seconds that each answer had its worker to itself."""
        clocks = {worker: crowd.clock(contention) for worker, crowd in self._of.items()}
        return np.array([np.diff(clocks[answer.worker](answer.rollout))[0] for answer in self._answers])

    def misfit(self, contention: float) -> float:
        """How far the answers are from answer_s + tokens · token_s, over what they took."""
        own = self.alone(contention)
        answer_s, token_s = _line(self.tokens, own)
        return float(np.sqrt(np.mean((own - answer_s - token_s * self.tokens) ** 2)) / np.mean(own))


class _Crowd:
    """Answers of one worker: how many were in flight when."""

    def __init__(self, rollouts: Sequence[Interval], stopped: Sequence[Interval]) -> None:
        starts, ends = np.array(rollouts, np.float64).T
        halts = np.array(stopped, np.float64).reshape(-1, 2)
        self._times = np.unique(np.concatenate([starts, ends, halts.ravel()]))
        middle = (self._times[1:] + self._times[:-1]) / 2
        started = np.searchsorted(np.sort(starts), middle, "right")
        ended = np.searchsorted(np.sort(ends), middle, "right")
        self._in_flight = started - ended
        self._going = np.ones(len(middle), bool)
        for start, end in halts:
            self._going &= ~((middle > start) & (middle < end))

    def clock(self, contention: float) -> Callable[[Interval], F64]:
        """Seconds of its own that an answer in flight all the time would have had, by moments."""
        slowness = 1 + contention * np.maximum(self._in_flight - 1, 0)
        worked = np.concatenate([[0.0], np.cumsum(np.diff(self._times) * self._going / slowness)])
        return lambda moments: np.asarray(np.interp(moments, self._times, worked))


def _teacher(run: Measured) -> tuple[float, float]:
    """(tokens a second, seconds a request): arrivals served batch by batch at that rate end when these did."""
    answers = sorted(run.everyone, key=lambda answer: answer.arrived)
    fitted_ones = set(run.answers)
    chosen = np.array([answer in fitted_ones for answer in answers])
    arrivals = np.array([answer.arrived for answer in answers])
    tokens = np.array([answer.prompt_tokens + answer.response_tokens for answer in answers], np.float64)
    ends = np.array([answer.scored for answer in answers])
    settings = run.config.teacher

    def late(log_rate: float) -> F64:
        rate = float(np.exp(log_rate))
        done = served(arrivals, tokens, rate, settings.batch_tokens, settings.batch_window_ms / 1000)
        return np.asarray((ends - done)[chosen])

    def misfit(log_rate: float) -> float:
        lateness = late(log_rate)
        return float(np.sqrt(np.mean((lateness - max(0.0, float(lateness.mean()))) ** 2)))

    slowest = float(np.log(tokens.sum() / max(1e-6, float(np.sum(ends - arrivals)))))
    log_rate, _ = _lowest(misfit, slowest, slowest + 12)
    return float(np.exp(log_rate)), max(0.0, float(late(log_rate).mean()))


def served(arrivals: F64, tokens: F64, rate: float, batch_tokens: int, window_s: float) -> F64:
    """When one replica is done with answers that arrive in this order, in batches of at most `batch_tokens`."""
    ends, free, i = np.empty(len(arrivals)), -np.inf, 0
    while i < len(arrivals):
        start, first, total = max(free, arrivals[i] + (0.0 if free > arrivals[i] else window_s)), i, tokens[i]
        i += 1
        while i < len(arrivals) and arrivals[i] <= start and total + tokens[i] <= batch_tokens:
            total += tokens[i]
            i += 1
        free = start + total / rate
        ends[first:i] = free
    return ends


def _micro_batches(run: Measured) -> tuple[F64, F64]:
    """(padded tokens, seconds) of each."""
    tokens, spans = zip(*run.micro_batches, strict=True)
    return np.array(tokens, np.float64), np.diff(np.array(spans, np.float64)).ravel()


def _line(x: F64, y: F64) -> tuple[float, float]:
    """(intercept, slope) of least squares, neither negative; through the origin where `x` does not vary."""
    through_origin = 0.0, max(float(y.sum() / x.sum()), 1e-12)
    if len(x) < 2 or np.ptp(x) == 0:
        return through_origin
    slope = float(np.cov(x, y, bias=True)[0, 1] / np.var(x))
    intercept = float(y.mean() - slope * x.mean())
    return (intercept, slope) if slope > 0 and intercept >= 0 else through_origin


def _lowest(misfit: Callable[[float], float], low: float, high: float) -> tuple[float, bool]:
    """(where `misfit` is lowest between the bounds, whether it depends on where): a grid, refined around its best."""
    grid = np.linspace(low, high, 61)
    values = np.array([misfit(float(point)) for point in grid])
    varied = bool(np.ptp(values) > FLAT)
    for _ in range(4):
        best = int(np.argmin(values))
        grid = np.linspace(grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)], 21)
        values = np.array([misfit(float(point)) for point in grid])
    return float(grid[int(np.argmin(values))]), varied


def spread_of(values: Iterable[float] | F64, scale: float = 1.0) -> Spread:
    """The distribution of `values` times `scale`: constant where they hardly differ, else as it was seen."""
    found: F64 = np.sort(np.asarray(values, np.float64))
    mean = float(found.mean())
    if found.std() <= 0.01 * mean:
        return Spread(mean=scale * mean)
    if len(found) > SHAPE_POINTS:
        found = np.asarray(
            np.quantile(found, (np.arange(SHAPE_POINTS) + 0.5) / SHAPE_POINTS, method="inverted_cdf"), np.float64
        )
    shape = found / found.mean()
    return Spread(kind="observed", mean=scale * mean, shape=tuple(max(float(value), 1e-6) for value in shape.round(4)))
