"""Shows a simulated run as a table."""

from __future__ import annotations

from rich.table import Table

from deploy.simulator.config import SimulationConfig
from deploy.simulator.result import Simulation

SMALLEST_SHARE = 5e-4
"""Waits below this share of a step would be shown as 0.0% and are left out."""


def summary(config: SimulationConfig, simulation: Simulation) -> Table:
    """Step time, idle ratio, waits, queues and rates."""
    total = simulation.total
    rollout, teacher, learner = config.rollout, config.teacher, config.learner
    table = Table(box=None, show_header=False)
    table.add_row("run", f"{config.steps} steps of {config.samples_per_step} answers, staleness {config.max_staleness}")
    slots = f"{rollout.workers} workers x {rollout.concurrency} answers"
    table.add_row("machines", f"{slots}, {teacher.replicas} teachers, {learner.ranks} ranks")
    table.add_row("step", f"{simulation.step_s:.3g} s")
    table.add_row("slowest stage", f"{simulation.slowest_stage_s:.3g} s: the lower bound of a step at full overlap")
    table.add_row("response tokens", f"{simulation.tokens_per_s:,.0f} /s")
    table.add_row("trainer idle ratio", f"{total.trainer_idle_ratio:.1%} of a step")
    for stage, share in total.wait_shares.items():
        if share > SMALLEST_SHARE:
            table.add_row(f"  waits for {stage}", f"{share:.1%}")
    for name, depth in simulation.queues.items():
        table.add_row(f"queue: {name}", f"mean {depth.mean:.1f}, max {depth.max} answers")
    for name, share in simulation.busy.items():
        table.add_row(f"busy: {name}", f"{share:.1%}")
    if simulation.evicted:
        table.add_row("evicted", f"{simulation.evicted} answers grew too old and were generated again")
    return table
