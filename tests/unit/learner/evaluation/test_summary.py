"""Progress line of a step, equal to the one in the quickstart, and the final table."""

from __future__ import annotations

from common.telemetry.step_times import step_times
from common.telemetry.trace import TraceSpan
from learner.evaluation.summary import RunSummary, final_table, stage_line, step_line
from learner.loop.step_stats import speeds
from tests.support.paths import ROOT

METRICS = {
    "kl/lower_bound": 0.912,
    "grad_norm": 9.81,
    "tokens_per_s": 13.6,
    "time/total_s": 6.13,
    "time/rollout_s": 1.9,
    "time/score_s": 1.1,
    "time/accumulate_s": 1.2,
    "time/step_s": 0.5,
    "time/sync_s": 2.3,
    "time/parity_s": 0.2,
    "time/trainer_idle_ratio": 0.72,
    "queue_depth/queue": 0.0,
    "queue_depth/rollout": 3.2,
    "queue_depth/score": 1.46,
    "staleness/mean_age": 0.0,
    "parity/max_nats": 6.1e-5,
}


def test_the_quickstart_shows_the_lines_that_a_run_prints() -> None:
    metrics = {**METRICS, **speeds(83, {"rollout": 1.9, "score": 1.1, "accumulate": 1.2, "step": 0.5})}
    line, stages = step_line(3, 20, metrics, left_s=104.2), stage_line(metrics)
    quickstart = (ROOT / "docs/index.md").read_text()
    assert f"\n{line}\n" in quickstart
    assert f"\n{stages}\n" in quickstart
    assert "rollout 1.9 at 44, score 1.1 at 75, accumulate 1.2 at 69, step 0.5, sync 2.3, parity 0.2" in stages
    assert line.endswith("0:01:44 left")


def test_a_long_runs_line_fits_100_columns() -> None:
    large = {"grad_norm": 1234.5, "tokens_per_s": 123456.0, "time/total_s": 1234.5, "time/trainer_idle_ratio": 1.0}
    line = step_line(10_000, 10_000, {**METRICS, **large}, left_s=9 * 86_400 + 1)
    assert len(line) <= 100
    assert max(map(len, stage_line(METRICS).splitlines())) <= 100


def test_a_stage_that_did_nothing_has_no_speed() -> None:
    assert speeds(80, {"rollout": 2.0, "score": 0.0}) == {"tokens_per_s/rollout": 40.0}


def test_the_final_table_lists_the_trainers_waits_largest_first() -> None:
    spans = [
        TraceSpan("rollout", "worker 0", 0.0, 2.0, {}),
        TraceSpan("score", "teacher", 2.0, 7.0, {}),
        TraceSpan("accumulate", "rank 0", 7.0, 10.0, {}),
    ]
    summary = RunSummary(planned_steps=1)
    summary.add_times(step_times(spans, (0.0, 10.0)))
    *_, last = final_table(summary).splitlines()
    assert last == "the learner waited for 70% of the steps' time: score 50%, rollout 20%"
