"""What a simulated run is made of: how many of each part, and how fast each is. Times in seconds, rates a second."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from common.config.base import Fraction, NonNegative, Positive, PositiveFloat, Section

Seconds = Annotated[float, Field(ge=0)]


class Spread(Section):
    """A positive quantity that differs from answer to answer."""

    kind: Literal["constant", "uniform", "exponential", "lognormal", "observed"] = "constant"
    mean: PositiveFloat
    spread: Annotated[float, Field(ge=0)] = 0.0
    """`uniform`: the values lie within mean · (1 ± spread), so at most 1. `lognormal`: standard deviation over mean.
    The others have none to choose."""
    shape: tuple[PositiveFloat, ...] = ()
    """`observed`: values over their mean, all equally likely."""

    @model_validator(mode="after")
    def _spread_fits(self) -> Spread:
        if (self.kind == "observed") != bool(self.shape):
            raise ValueError(f"shape goes with kind `observed`, not with `{self.kind}` alone")
        if self.kind in ("constant", "exponential", "observed") and self.spread:
            raise ValueError(f"spread {self.spread} means nothing for kind `{self.kind}`")
        if self.kind == "uniform" and self.spread > 1:
            raise ValueError(f"spread {self.spread} of `uniform` must be at most 1: values are positive")
        return self


class SimulatedRollout(Section):
    """The rollout workers."""

    workers: Positive = 1
    concurrency: Positive = 128
    """Answers that one worker decodes at a time; others wait."""
    answer_tokens: Spread = Spread(mean=512)
    token_s: Spread = Spread(mean=0.02)
    """One token of an answer that has the worker for itself, drawn once for each answer."""
    contention: Fraction = 0.0
    """Share by which each further answer in flight slows down all of its worker."""
    answer_s: Seconds = 0.0
    """Of each answer, whatever its length: prompt, dispatch."""


class SimulatedTeacher(Section):
    """The teacher servers. Each takes the answers in the order of their arrival, batch by batch."""

    replicas: Positive = 1
    tokens_per_s: PositiveFloat = 10_000.0
    """Prompt and response tokens that one replica scores."""
    batch_tokens: Positive = 1
    """Of one batch, whose answers are done together; a longer answer is one by itself, so 1: one after another."""
    window_s: Seconds = 0.0
    """How long an idle replica waits for more, once there is an answer."""
    context_tokens: NonNegative = 0
    """Of the context, which every replica computes once, before its first answer."""
    context_every_version: bool = False
    """A teacher that follows the student (`live`, `ema`) computes its context again after every step."""
    request_s: Seconds = 0.0
    """Latency of an answer that keeps no replica busy: network, waiting for a batch."""


class SimulatedLearner(Section):
    """The learner's ranks."""

    ranks: Positive = 1
    tokens_per_s: PositiveFloat = 10_000.0
    """Padded tokens that one rank takes forward and backward."""
    micro_batch_tokens: Positive = 8192
    packed: bool = False
    """Answers lie behind one another (`learner.packing`): a micro-batch costs its tokens, not its padding."""
    micro_batch_s: Seconds = 0.0
    """Of each micro-batch, whatever its size."""
    step_s: Seconds = 0.0
    """Optimiser step, all ranks together."""


class SimulatedSync(Section):
    """New weights on their way to the engines, which stand still meanwhile."""

    seconds: Seconds = 0.0
    parity_s: Seconds = 0.0
    """The proof afterwards: the engines answer again, the next step has not begun."""


class SimulationConfig(Section):
    """A run over stages of given speed. Equal seeds give equal runs."""

    steps: Positive = 10
    samples_per_step: Positive = 128
    prompt_tokens: NonNegative = 64
    max_staleness: NonNegative = 0
    """Steps that rollouts may run ahead of training."""
    loop_s: Seconds = 0.0
    """Of each step: the loop itself, no stage being at work."""
    interference: Fraction = 0.0
    """Share by which each other kind of stage at work (rollouts, teachers, learner) slows one down: 0 where each has
    devices of its own, 1 where they take turns on the same ones."""
    seed: NonNegative = 0
    rollout: SimulatedRollout = SimulatedRollout()
    teacher: SimulatedTeacher = SimulatedTeacher()
    learner: SimulatedLearner = SimulatedLearner()
    sync: SimulatedSync = SimulatedSync()
