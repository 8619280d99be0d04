"""The loop without models: overlap of the stages, long answers, cost and memory of a trajectory."""

from __future__ import annotations

import statistics

from learner.data.samples import SampleSource
from tests.benchmarks.figures import Figure, Figures
from tests.benchmarks.stub_services import Latencies, prompts, stub_config
from tests.benchmarks.stub_steps import run_steps, store_use

ANSWERS, STEPS = 32, 7
MIB = 1 << 20
ROOM_BYTES = 320 * MIB


def run() -> Figures:
    """All figures; about three minutes."""
    return {**overlap(), **tail(), **controller_cost(), **object_store()}


def overlap() -> Figures:
    """Step time over the slowest stage: 1.0 s of rollouts, 0.8 s of scoring, 0.9 s of training."""
    latencies = Latencies(ANSWERS, rollout=1.0, score=0.8, train=0.9)
    config = stub_config(
        rollout={"batch_size": ANSWERS}, learner={"micro_batch_tokens": 24}, teacher={"batch_items": 1}
    )
    steps = run_steps(config, latencies, STEPS)
    return {
        "loop.overlap_ratio": Figure(
            statistics.median(step.wall_s for step in steps[1:]),
            "x",
            f"median of {STEPS - 1} steps of {ANSWERS} answers; slowest stage 1.0 s; serial would be 2.7",
            at_most=1.25,
            limit="1: the slowest stage",
        )
    }


def tail(steps: int = 50, answers: int = 64, slots: int = 8) -> Figures:
    """Step time over the mean work of a step, for answers of very different lengths, one step ahead.

    The work of a step is the sum of its answers' durations over the engine's slots.
    """
    latencies = Latencies(answers, rollout=0.2, sigma=1.0)
    config = stub_config(
        rollout={"batch_size": answers, "concurrency": slots, "max_staleness": 1}, learner={"steps": steps}
    )
    found = run_steps(config, latencies, steps)
    source = SampleSource(config, prompts(64))
    durations = [latencies.answer_s(source[number].sampling.seed) for number in range(steps * answers)]
    work = sum(durations) / slots / steps
    # All steps: the first has no step before it to fill, the last none after it, and both belong to a run.
    value = statistics.fmean(step.wall_s for step in found) / work
    return {
        "loop.tail_ratio": Figure(
            value,
            "x",
            f"mean of {steps} steps of {answers} answers in {slots} slots, durations lognormal with sigma 1, "
            f"max_staleness 1: {value * work:.2f} s a step, {work:.2f} s of work; the longest answer took "
            f"{max(durations):.1f} s",
            at_most=1.15,
            limit="1: no slot ever idle",
        )
    }


def controller_cost(few: int = 1_000, many: int = 10_000) -> Figures:
    """CPU time of the loop's thread per trajectory with all answers of a step in flight at once."""
    cost = {}
    for count, steps in ((few, 6), (many, 2)):
        config = stub_config(
            rollout={"batch_size": count, "concurrency": count},
            learner={"micro_batch_tokens": 8192},
            loss={"top_k": 1},
        )
        later = run_steps(config, Latencies(count), steps)[1:]
        cost[count] = statistics.median(step.cpu_s for step in later) / count * 1e6
        whole = statistics.median(step.wall_s for step in later) / count * 1e6
    return {
        "loop.controller_us_per_trajectory": Figure(
            cost[many],
            "us",
            f"CPU time of the loop's thread in a step of {many} answers, all in flight; the step itself took "
            f"{whole:.0f} us an answer (actors, HTTP and object store on the same two cores)",
            at_most=2000,
        ),
        "loop.controller_growth": Figure(
            cost[many] / cost[few],
            "x",
            f"CPU time per trajectory with {many} in flight, {cost[many]:.0f} us, over that with {few}, "
            f"{cost[few]:.0f} us",
            at_most=1.3,
            limit="1: no work but a trajectory's own",
        ),
    }


def object_store(steps: int = 12, answers: int = 64, tokens: int = 512, room: int = 4) -> Figures:
    """Most bytes at once in an object store with room for `room` steps, over those that a step makes."""
    rollout = {"batch_size": answers, "max_tokens": tokens, "max_staleness": 1}
    config = stub_config(rollout=rollout, learner={"steps": steps, "micro_batch_tokens": 8192})
    store = store_use(config, Latencies(answers, rollout=0.5, train=0.3), steps, ROOM_BYTES)
    step_bytes = store.created_bytes / steps
    return {
        "loop.object_store_steps": Figure(
            (store.peak_bytes + store.spilled_bytes) / step_bytes,
            "steps",
            f"most bytes at once and bytes written to disk, over the {step_bytes / MIB:.0f} MiB of a step's {answers} "
            f"answers of {tokens} tokens, k = 256, max_staleness 1; {store.spilled_bytes / MIB:.0f} MiB written",
            at_most=room,
            limit="2: the step and the one ahead",
        )
    }
