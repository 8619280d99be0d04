"""How fast the parts of a run were, from what it left behind: ``trace.json``, ``metrics.jsonl``, ``config.yaml``.

Each part is fitted with the simulator's own model of it, so a simulated run gives back what it was made of. The first
step is start-up (caches, compiled kernels, the context) and is left out where there are others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.config import Config, ConfigError
from common.config_file import load_config
from common.telemetry import Span
from common.trace import Event, read_trace
from deploy.simulation_config import (
    SimulatedLearner,
    SimulatedRollout,
    SimulatedSync,
    SimulatedTeacher,
    SimulationConfig,
    Spread,
)

F64 = NDArray[np.float64]

SHAPE_POINTS = 64
"""Values that an observed distribution is kept as, at most."""

FLAT = 0.02
"""Relative difference in how well two contentions explain the answers below which they explain them equally well."""


@dataclass(frozen=True)
class Answer:
    """One answer of a run, times in seconds since the epoch."""

    step: int
    worker: str
    rollout: Span
    scored: float
    prompt_tokens: int
    response_tokens: int


@dataclass(frozen=True)
class Measured:
    """What one run measured. ``micro_batches``: (padded tokens, seconds). ``loop_s``: of each step, nobody at work."""

    config: Config
    everyone: tuple[Answer, ...]
    """All answers: who was beside whom, ahead of whom."""
    answers: tuple[Answer, ...]
    """Those to fit: not of the first step, nor beside others that the run ended without."""
    micro_batches: tuple[tuple[int, float], ...]
    step_s: tuple[float, ...]
    syncs: tuple[Span, ...]
    """All of them: the engines stood still."""
    sync_s: tuple[float, ...]
    parity_s: tuple[float, ...]
    loop_s: tuple[float, ...]


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
    token_s, contention, answer_s, varied = _rollout(run)
    if not varied:
        notes.append(
            "every answer had as many others beside it as any other: how they slow each other down could not be told, "
            "and rollout.token_s is what it was in that company"
        )
    tokens = np.array([answer.response_tokens for answer in run.answers], np.float64)
    rate, request_s = _teacher(run)
    micro_batch_s, second_per_token = _line(*np.array(run.micro_batches, np.float64).T)
    simulation = SimulationConfig(
        **sizes(config),
        prompt_tokens=round(float(np.mean([answer.prompt_tokens for answer in run.answers]))),
        loop_s=float(np.mean(run.loop_s)),
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
            micro_batch_s=micro_batch_s,
            step_s=float(np.mean(run.step_s)),
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


# --- reading --------------------------------------------------------------------------------------------------------


def measured(folder: Path) -> Measured:
    """Read a run's files. Raises ConfigError for what is missing."""
    for name in ("config.yaml", "trace.json", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise ConfigError(f"{folder}: not a run that can be measured, there is no {name}")
    config = load_config(folder / "config.yaml")
    events = read_trace(folder / "trace.json")
    tracks = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    spans = [event for event in events if event["ph"] == "X"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "time/total_s" in line]
    answers = _answers(spans, tracks)
    if not answers or not steps:
        raise ConfigError(
            f"{folder}: no finished step whose timeline says how many tokens its answers had (response_tokens)"
        )
    first = min(line["step"] for line in steps)
    # Beside the answers of the last steps were others that never ended, of which the timeline knows nothing.
    known = max(answer.step for answer in answers) - config.rollout.max_staleness
    later = [line for line in steps if line["step"] > first] or steps

    def warm(stage: str, key: Callable[[Event], int]) -> list[Event]:
        of_stage = [event for event in spans if event["name"] == stage and "version" in event["args"]]
        return [event for event in of_stage if key(event) > first] or of_stage

    accumulated = warm("accumulate", lambda event: event["args"]["version"] + 1)
    batches = [event for event in accumulated if event["args"].get("padded_tokens")]
    closing = {stage: warm(stage, lambda event: event["args"]["version"]) for stage in ("step", "sync", "parity")}
    return Measured(
        config=config,
        answers=tuple(answer for answer in answers if first <= answer.step <= known) or tuple(answers),
        everyone=tuple(answers),
        micro_batches=tuple((event["args"]["padded_tokens"], event["dur"] / 1e6) for event in batches),
        step_s=tuple(event["dur"] / 1e6 for event in closing["step"]),
        syncs=tuple(_span(event) for event in spans if event["name"] == "sync"),
        sync_s=tuple(event["dur"] / 1e6 for event in closing["sync"]),
        parity_s=tuple(event["dur"] / 1e6 for event in closing["parity"]),
        loop_s=tuple(line["time/total_s"] * line.get("loop/wait/other", 0.0) for line in later),
    )


def _answers(spans: Sequence[Event], tracks: dict[int, str]) -> list[Answer]:
    scored = {event["args"]["sample"]: _span(event)[1] for event in spans if event["name"] == "score"}
    return [
        Answer(
            step=int(event["args"]["sample"].split("/")[0]),
            worker=tracks[event["pid"]],
            rollout=_span(event),
            scored=scored[event["args"]["sample"]],
            prompt_tokens=event["args"]["prompt_tokens"],
            response_tokens=event["args"]["response_tokens"],
        )
        for event in spans
        if event["name"] == "rollout" and "response_tokens" in event["args"] and event["args"]["sample"] in scored
    ]


def _span(event: Event) -> Span:
    return event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6


# --- fitting --------------------------------------------------------------------------------------------------------


def _rollout(run: Measured) -> tuple[Spread, float, float, bool]:
    """(seconds a token of an answer alone, contention, seconds an answer, whether contention could be told).

    For a given contention, the time each answer had the worker to itself follows from who was beside it when, and is
    answer_s + tokens · token_s. The contention is the one at which that fits best.
    """
    tokens = np.array([answer.response_tokens for answer in run.answers], np.float64)
    workers = {answer.worker for answer in run.everyone}
    crowds = {w: _Crowd([a.rollout for a in run.everyone if a.worker == w], run.syncs) for w in workers}

    def alone(contention: float) -> F64:
        clocks = {worker: crowd.clock(contention) for worker, crowd in crowds.items()}
        return np.array([np.diff(clocks[answer.worker](answer.rollout))[0] for answer in run.answers])

    def misfit(contention: float) -> float:
        own = alone(contention)
        answer_s, token_s = _line(tokens, own)
        return float(np.sqrt(np.mean((own - answer_s - token_s * tokens) ** 2)) / np.mean(own))

    contention, varied = _lowest(misfit, 0.0, 1.0)
    if not varied:
        contention = 0.0
    own = alone(contention)
    answer_s, token_s = _line(tokens, own)
    ratios = own / (answer_s + tokens * token_s)
    return spread_of(ratios, token_s), contention, answer_s, varied


class _Crowd:
    """Answers of one worker: how many were in flight when."""

    def __init__(self, rollouts: Sequence[Span], stopped: Sequence[Span]) -> None:
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

    def clock(self, contention: float) -> Callable[[Span], F64]:
        """Seconds of its own that an answer in flight all the time would have had, by moments."""
        slowness = 1 + contention * np.maximum(self._in_flight - 1, 0)
        worked = np.concatenate([[0.0], np.cumsum(np.diff(self._times) * self._going / slowness)])
        return lambda moments: np.asarray(np.interp(moments, self._times, worked))


def _teacher(run: Measured) -> tuple[float, float]:
    """(tokens a second, seconds a request): arrivals served batch by batch at that rate end when these did."""
    answers = sorted(run.everyone, key=lambda answer: answer.rollout[1])
    fitted_ones = set(run.answers)
    chosen = np.array([answer in fitted_ones for answer in answers])
    arrivals = np.array([answer.rollout[1] for answer in answers])
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
