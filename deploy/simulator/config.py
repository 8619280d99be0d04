"""Configuration of a simulation: number and speed of workers, teachers and ranks. Rates are per second."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from common.config.base import Fraction, NonNegative, Positive, PositiveFloat, Section

Seconds = Annotated[float, Field(ge=0)]


class Spread(Section):
    """Distribution of a positive quantity over answers."""

    kind: Literal["constant", "uniform", "exponential", "lognormal", "observed"] = "constant"
    mean: PositiveFloat
    spread: Annotated[float, Field(ge=0)] = 0.0
    """`uniform`: values lie within mean · (1 ± spread), spread at most 1. `lognormal`: standard deviation over mean.
    Other kinds take none."""
    shape: tuple[PositiveFloat, ...] = ()
    """`observed`: values divided by their mean, all equally likely."""

    @model_validator(mode="after")
    def _spread_fits(self) -> Spread:
        if (self.kind == "observed") != bool(self.shape):
            raise ValueError(f"kind `{self.kind}` with {len(self.shape)} values of shape: only `observed` has a shape")
        if self.kind in ("constant", "exponential", "observed") and self.spread:
            raise ValueError(f"spread {self.spread}: kind `{self.kind}` takes none; use `uniform` or `lognormal`")
        if self.kind == "uniform" and self.spread > 1:
            raise ValueError(f"spread {self.spread} of `uniform` must be at most 1: values are positive")
        return self

    def draw(self, rng: np.random.Generator) -> float:
        """Draw one value."""
        if self.kind == "uniform":
            return self.mean * (1 + self.spread * (2 * rng.random() - 1))
        if self.kind == "exponential":
            return self.mean * rng.standard_exponential()
        if self.kind == "observed":
            return self.mean * self.shape[rng.integers(len(self.shape))]
        if self.kind == "lognormal":
            variance = math.log1p(self.spread**2)
            return self.mean * math.exp(math.sqrt(variance) * rng.standard_normal() - variance / 2)
        return self.mean


class SimulatedRollout(Section):
    """The rollout workers."""

    workers: Positive = 1
    concurrency: Positive = 128
    """Maximum number of answers that one worker decodes at a time."""
    answer_tokens: Spread = Spread(mean=512)
    token_s: Spread = Spread(mean=0.02)
    """Time of one token on an otherwise idle worker, drawn once for each answer."""
    contention: Fraction = 0.0
    """Fraction by which each further answer in flight slows down all answers of the worker."""
    answer_s: Seconds = 0.0
    """Fixed time of each answer: prompt, dispatch."""


class SimulatedTeacher(Section):
    """The teacher servers. Each scores answers in order of arrival, batch by batch."""

    replicas: Positive = 1
    tokens_per_s: PositiveFloat = 10_000.0
    """Prompt and response tokens that one replica scores per second."""
    batch_tokens: Positive = 1
    """Maximum tokens of a batch. A longer answer is a batch by itself, so 1 scores answers one by one."""
    window_s: Seconds = 0.0
    """Time that an idle replica waits for more answers after the first."""
    context_tokens: NonNegative = 0
    """Tokens of the context, which every replica computes once, before its first answer."""
    context_every_version: bool = False
    """True for a teacher that follows the student (`live`, `ema`): it computes its context again after every step."""
    request_s: Seconds = 0.0
    """Latency of an answer that keeps no replica busy, such as the network's."""


class SimulatedLearner(Section):
    """The learner's ranks."""

    ranks: Positive = 1
    tokens_per_s: PositiveFloat = 10_000.0
    """Padded tokens that one rank takes forward and backward per second."""
    micro_batch_tokens: Positive = 8192
    packed: bool = False
    """True for packed micro-batches (`learner.packing`), which cost their tokens without padding."""
    micro_batch_s: Seconds = 0.0
    """Fixed time of each micro-batch."""
    step_s: Seconds = 0.0
    """Time of the optimiser step, all ranks together."""


class SimulatedSync(Section):
    """The weight sync, during which the engines are paused."""

    seconds: Seconds = 0.0
    parity_s: Seconds = 0.0
    """Time of the parity probe: the engines generate again, the next step has not begun."""


class SimulationConfig(Section):
    """A run with stages of given speeds. Equal seeds give equal runs."""

    steps: Positive = 10
    samples_per_step: Positive = 128
    prompt_tokens: NonNegative = 64
    max_staleness: NonNegative = 0
    """Steps by which rollouts may run ahead of training."""
    loop_s: Seconds = 0.0
    """Time of each step in which no stage is at work."""
    interference: Fraction = 0.0
    """Fraction by which each other kind of stage at work (rollouts, teachers, learner) slows a stage down: 0 for
    separate devices, 1 for stages that take turns on the same devices."""
    seed: NonNegative = 0
    rollout: SimulatedRollout = SimulatedRollout()
    teacher: SimulatedTeacher = SimulatedTeacher()
    learner: SimulatedLearner = SimulatedLearner()
    sync: SimulatedSync = SimulatedSync()
