"""Fits the speeds of a simulation to the files of a measured run.

Each part is fitted with the simulator's own model of it, so fitting a simulated run recovers its configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

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
from deploy.simulator.run import F64, Measured, without_interference

SHAPE_POINTS = 64
"""Maximum number of values of an observed distribution."""

MIN_IMPROVEMENT = 0.02
"""Relative fit errors that differ by less count as equal, so the parameter cannot be determined."""

CONTENTIONS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0)
"""Values tried for each interference."""


@dataclass(frozen=True)
class Fit:
    """A simulation like the measured run, and notes on parameters that the run does not determine."""

    simulation: SimulationConfig
    notes: tuple[str, ...]


def fitted(run: Measured) -> Fit:
    """Fit a measured run."""
    config, notes = run.config, []
    interference = _interference(run)
    run = without_interference(run, interference)
    token_s, contention, answer_s, determined = _rollout(run)
    if not determined:
        notes.append(
            "all answers had equally many others in flight, so rollout.contention could not be determined: it is 0 and "
            "rollout.token_s is the time at that number in flight"
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
    """The top-level keys of a simulation from a run's configuration."""
    return {
        "steps": config.learner.steps,
        "samples_per_step": config.rollout.batch_size * config.rollout.samples_per_prompt,
        "max_staleness": config.rollout.max_staleness,
    }


# --- fitting --------------------------------------------------------------------------------------------------------


def _interference(run: Measured) -> float:
    """The interference that best explains the durations of answers and micro-batches with and without other stages at
    work; 0 if it makes no difference.
    """

    def error(interference: float) -> float:
        undisturbed = without_interference(run, interference)
        rollout = _RolloutFit(undisturbed)
        return _line_error(*_micro_batches(undisturbed)) + min(map(rollout.error, CONTENTIONS))

    grid = np.linspace(0.0, 1.0, 21)
    values = np.array([error(float(point)) for point in grid])
    best = int(np.argmin(values))
    return float(grid[best]) if values[0] - values[best] > MIN_IMPROVEMENT else 0.0


def _rollout(run: Measured) -> tuple[Spread, float, float, bool]:
    """(token_s, contention, answer_s, True if the run determines the contention).

    For a given contention, the answers in flight over time give the time that each answer would take on an idle worker.
    The model of that time is answer_s + tokens · token_s; the contention is the value at which it fits best.
    """
    rollout = _RolloutFit(run)
    contention, determined = _minimum(rollout.error, 0.0, 1.0)
    if not determined:
        contention = 0.0
    alone_s = rollout.alone_s(contention)
    answer_s, token_s = _line(rollout.tokens, alone_s)
    ratios = alone_s / (answer_s + rollout.tokens * token_s)
    return spread_of(ratios, token_s), contention, answer_s, determined


class _RolloutFit:
    """The answers to fit, and the number in flight on each worker over time."""

    def __init__(self, run: Measured) -> None:
        workers = {answer.worker for answer in run.all_answers}
        self._answers = run.answers
        self._loads = {
            w: _WorkerLoad([a.rollout for a in run.all_answers if a.worker == w], run.syncs) for w in workers
        }
        self.tokens = np.array([answer.response_tokens for answer in run.answers], np.float64)

    def alone_s(self, contention: float) -> F64:
        """Seconds that each answer would take on an idle worker."""
        clocks = {worker: load.clock(contention) for worker, load in self._loads.items()}
        return np.array([np.diff(clocks[answer.worker](answer.rollout))[0] for answer in self._answers])

    def error(self, contention: float) -> float:
        """Relative error of the best answer_s + tokens · token_s."""
        return _line_error(self.tokens, self.alone_s(contention))


class _WorkerLoad:
    """Number of answers in flight on one worker over time."""

    def __init__(self, rollouts: Sequence[Interval], syncs: Sequence[Interval]) -> None:
        starts, ends = np.array(rollouts, np.float64).T
        pauses = np.array(syncs, np.float64).reshape(-1, 2)
        self._times = np.unique(np.concatenate([starts, ends, pauses.ravel()]))
        middle = (self._times[1:] + self._times[:-1]) / 2
        started = np.searchsorted(np.sort(starts), middle, "right")
        ended = np.searchsorted(np.sort(ends), middle, "right")
        self._in_flight = started - ended
        self._running = np.ones(len(middle), bool)
        for start, end in pauses:
            self._running &= ~((middle > start) & (middle < end))

    def clock(self, contention: float) -> Callable[[Interval], F64]:
        """Function from moments to the progress, in seconds alone, of an answer in flight all the time."""
        slowness = 1 + contention * np.maximum(self._in_flight - 1, 0)
        worked = np.concatenate([[0.0], np.cumsum(np.diff(self._times) * self._running / slowness)])
        return lambda moments: np.asarray(np.interp(moments, self._times, worked))


def _teacher(run: Measured) -> tuple[float, float]:
    """(tokens_per_s, request_s) at which the simulator's batches end when the measured ones did."""
    answers = sorted(run.all_answers, key=lambda answer: answer.arrived)
    to_fit = set(run.answers)
    fitted_rows = np.array([answer in to_fit for answer in answers])
    arrivals = np.array([answer.arrived for answer in answers])
    tokens = np.array([answer.prompt_tokens + answer.response_tokens for answer in answers], np.float64)
    ends = np.array([answer.scored for answer in answers])
    settings = run.config.teacher

    def delays(log_rate: float) -> F64:
        rate = float(np.exp(log_rate))
        done = served(arrivals, tokens, rate, settings.batch_tokens, settings.batch_window_ms / 1000)
        return np.asarray((ends - done)[fitted_rows])

    def error(log_rate: float) -> float:
        late = delays(log_rate)
        return float(np.sqrt(np.mean((late - max(0.0, float(late.mean()))) ** 2)))

    slowest = float(np.log(tokens.sum() / max(1e-6, float(np.sum(ends - arrivals)))))
    log_rate, _ = _minimum(error, slowest, slowest + 12)
    return float(np.exp(log_rate)), max(0.0, float(delays(log_rate).mean()))


def served(arrivals: F64, tokens: F64, rate: float, batch_tokens: int, window_s: float) -> F64:
    """End times of answers that one replica scores in order of `arrivals`, in batches of up to `batch_tokens`."""
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
    """(padded tokens, seconds) of each micro-batch."""
    tokens, spans = zip(*run.micro_batches, strict=True)
    return np.array(tokens, np.float64), np.diff(np.array(spans, np.float64)).ravel()


def _line(x: F64, y: F64) -> tuple[float, float]:
    """Least-squares (intercept, slope), neither negative; through the origin if `x` does not vary."""
    through_origin = 0.0, max(float(y.sum() / x.sum()), 1e-12)
    if len(x) < 2 or np.ptp(x) == 0:
        return through_origin
    slope = float(np.cov(x, y, bias=True)[0, 1] / np.var(x))
    intercept = float(y.mean() - slope * x.mean())
    return (intercept, slope) if slope > 0 and intercept >= 0 else through_origin


def _line_error(x: F64, y: F64) -> float:
    """Root mean square error of the best line, relative to the mean of `y`."""
    intercept, slope = _line(x, y)
    return float(np.sqrt(np.mean((y - intercept - slope * x) ** 2)) / np.mean(y))


def _minimum(error: Callable[[float], float], low: float, high: float) -> tuple[float, bool]:
    """(minimum of `error` in [low, high], True if `error` varies there), by a grid refined around its best point."""
    grid = np.linspace(low, high, 61)
    values = np.array([error(float(point)) for point in grid])
    varies = bool(np.ptp(values) > MIN_IMPROVEMENT)
    for _ in range(4):
        best = int(np.argmin(values))
        grid = np.linspace(grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)], 21)
        values = np.array([error(float(point)) for point in grid])
    return float(grid[int(np.argmin(values))]), varies


def spread_of(values: Iterable[float] | F64, scale: float = 1.0) -> Spread:
    """The distribution of `values` times `scale`: constant if they hardly differ, else observed."""
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
