"""Fits recover the configuration of a simulated run; undetermined parameters become notes."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from common.config.loader import dump_config, validate
from common.config.model import Config, ConfigError
from common.telemetry.trace import TraceFile, TraceSpan, read_trace
from deploy.cli.main import app
from deploy.simulator.config import SimulationConfig
from deploy.simulator.file import load_simulation
from deploy.simulator.fit import Fit, fitted, served
from deploy.simulator.result import Simulation
from deploy.simulator.run import measured
from deploy.simulator.simulate import simulate

TRUTH: dict[str, Any] = {
    "steps": 6,
    "samples_per_step": 24,
    "prompt_tokens": 20,
    "loop_s": 0.3,
    "rollout": {
        "workers": 2,
        "concurrency": 8,
        "answer_tokens": {"kind": "uniform", "mean": 60, "spread": 0.9},
        "token_s": {"mean": 0.02},
        "contention": 0.15,
        "answer_s": 0.1,
    },
    "teacher": {"tokens_per_s": 700, "request_s": 0.05, "batch_tokens": 400, "window_s": 0.005},
    "learner": {"tokens_per_s": 900, "micro_batch_tokens": 512, "micro_batch_s": 0.2, "step_s": 0.4},
    "sync": {"seconds": 0.6, "parity_s": 0.25},
}


def config_of(truth: dict[str, Any]) -> Config:
    """The run's configuration with the sizes of `truth`."""
    rollout, teacher = truth["rollout"], truth["teacher"]
    settings = {
        "run": {"name": "measured"},
        "student": {"model": "none"},
        "context": {"text": "c"},
        "data": {"train": "none"},
        "rollout": {
            "batch_size": truth["samples_per_step"],
            "workers": rollout["workers"],
            "concurrency": rollout["concurrency"],
            "max_staleness": truth.get("max_staleness", 0),
        },
        "teacher": {"batch_tokens": teacher["batch_tokens"], "batch_window_ms": 1000 * teacher["window_s"]},
        "learner": {
            "steps": truth["steps"],
            "micro_batch_tokens": truth["learner"]["micro_batch_tokens"],
            "packing": "auto" if truth["learner"].get("packed") else "off",
        },
        "eval": {"every": 0},
    }
    return validate(Config, settings)


def write_run_files(folder: Path, truth: dict[str, Any]) -> Simulation:
    """Write the files of a run simulated from `truth`."""
    simulation = simulate(SimulationConfig.model_validate(truth))
    (folder / "config.yaml").write_text(dump_config(config_of(truth)))
    with TraceFile(folder / "trace.json") as trace:
        trace.write(simulation.spans)
    lines = [
        {"step": step, "time/total_s": times.total_s, "time/wait_ratio/other": times.wait_shares["other"]}
        for step, times in enumerate(simulation.steps, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return simulation


def fit(folder: Path) -> Fit:
    return fitted(measured(folder))


@pytest.mark.parametrize("max_staleness", [0, 2])  # at 1 answers are evicted, which the timeline does not show
def test_a_fit_recovers_the_configuration(tmp_path: Path, max_staleness: int) -> None:
    slots = 8 if max_staleness == 0 else 64  # with all slots always taken the run does not determine the contention
    write_run_files(tmp_path, merged(TRUTH, {"max_staleness": max_staleness, "rollout": {"concurrency": slots}}))
    found = fit(tmp_path)
    simulation = found.simulation
    assert not found.notes
    assert simulation.interference == 0
    assert (simulation.steps, simulation.samples_per_step, simulation.max_staleness) == (6, 24, max_staleness)
    assert simulation.prompt_tokens == 20
    assert (simulation.rollout.workers, simulation.rollout.concurrency) == (2, slots)
    assert simulation.rollout.contention == pytest.approx(0.15, abs=0.01)
    assert simulation.rollout.token_s.mean == pytest.approx(0.02, rel=0.03)
    assert simulation.rollout.answer_s == pytest.approx(0.1, abs=0.02)
    assert simulation.rollout.answer_tokens.mean == pytest.approx(60, rel=0.1)
    assert simulation.teacher.tokens_per_s == pytest.approx(700, rel=0.05)
    assert simulation.teacher.request_s == pytest.approx(0.05, abs=0.03)
    assert simulation.learner.tokens_per_s == pytest.approx(900, rel=0.01)
    assert simulation.learner.micro_batch_s == pytest.approx(0.2, abs=0.01)
    assert simulation.learner.step_s == pytest.approx(0.4, abs=1e-3)
    assert (simulation.sync.seconds, simulation.sync.parity_s) == pytest.approx((0.6, 0.25), abs=1e-3)
    assert simulation.loop_s == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize(
    "change",
    [
        {"samples_per_step": 48},
        {"rollout": {"workers": 4}},
        {"rollout": {"answer_tokens": {"mean": 120}}},
        {"learner": {"micro_batch_tokens": 2048}},
    ],
)
def test_a_fit_predicts_other_runs(tmp_path: Path, change: dict[str, Any]) -> None:
    write_run_files(tmp_path, TRUTH)
    other = simulate(SimulationConfig.model_validate(merged(TRUTH, change)))
    model = fit(tmp_path).simulation.model_dump()
    predicted = simulate(SimulationConfig.model_validate(merged(model, change)))
    assert predicted.step_s == pytest.approx(other.step_s, rel=0.1)


def test_a_long_run_is_fitted_to_the_steps_before_the_first_that_its_timeline_leaves_out(tmp_path: Path) -> None:
    simulation = write_run_files(tmp_path, merged(TRUTH, {"max_staleness": 0}))
    whole = measured(tmp_path)
    (gap_start, gap_end) = sorted(span.end for span in simulation.spans if span.stage == "parity")[-3:-1]
    with TraceFile(tmp_path / "trace.json") as trace:
        trace.write(span for span in simulation.spans if not gap_start < span.end <= gap_end)
    found = measured(tmp_path)
    assert found.steps == whole.steps[:-2]
    assert found.all_answers == tuple(answer for answer in whole.all_answers if answer.step < 4)


def test_a_resumed_run_is_fitted_like_one_that_went_through(tmp_path: Path) -> None:
    """Its second process starts hours later, and its first step is slow again."""
    (tmp_path / "through").mkdir()
    (tmp_path / "resumed").mkdir()
    through = write_run_files(tmp_path / "through", TRUTH)
    write_run_files(tmp_path / "resumed", TRUTH)
    middle = next(span.end for span in through.spans if span.stage == "parity" and span.args["version"] == 3)

    def later(span: TraceSpan) -> TraceSpan:
        return span if span.end <= middle else replace(span, start=span.start + 9000, end=span.end + 9000)

    spans = [later(span) for span in through.spans]
    slow = [
        replace(span, end=span.end + 300) if span.stage == "step" and span.args["version"] == 4 else span
        for span in spans
    ]
    with TraceFile(tmp_path / "resumed/trace.json") as trace:
        trace.write(slow)
    path = tmp_path / "resumed/metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    parts = [{**line, "run/part": 1 if line["step"] <= 3 else 2} for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in parts))
    expected, found = fit(tmp_path / "through").simulation, fit(tmp_path / "resumed").simulation
    assert found.learner.step_s == pytest.approx(expected.learner.step_s, rel=1e-3)
    assert found.rollout.token_s.mean == pytest.approx(expected.rollout.token_s.mean, rel=0.03)
    assert simulate(found).step_s == pytest.approx(simulate(expected).step_s, rel=0.1)


def test_packed_micro_batches_cost_their_tokens(tmp_path: Path) -> None:
    packed = merged(TRUTH, {"learner": {"packed": True}})
    truth = write_run_files(tmp_path, packed)
    found = fit(tmp_path).simulation
    assert found.learner.packed
    assert found.learner.tokens_per_s == pytest.approx(900, rel=0.02)
    assert simulate(found).step_s == pytest.approx(truth.step_s, rel=0.05)
    padded = simulate(SimulationConfig.model_validate(TRUTH))
    assert truth.total.stage_s["accumulate"] < 0.9 * padded.total.stage_s["accumulate"]


@pytest.mark.parametrize("interference", [0.3, 0.6, 1.0])
def test_interference_is_recovered(tmp_path: Path, interference: float) -> None:
    shared = merged(TRUTH, {"interference": interference})
    write_run_files(tmp_path, shared)
    found = fit(tmp_path).simulation
    assert found.interference == pytest.approx(interference, abs=0.15)
    assert found.learner.tokens_per_s == pytest.approx(900, rel=0.1)
    assert found.teacher.tokens_per_s == pytest.approx(700, rel=0.15)
    for change in (
        {"rollout": {"answer_tokens": {"mean": 20}}, "learner": {"micro_batch_tokens": 2048}},  # hardly any overlap
        {"samples_per_step": 48},
        {"interference": 0.0},  # a machine for each
    ):
        other = simulate(SimulationConfig.model_validate(merged(shared, change)))
        predicted = simulate(SimulationConfig.model_validate(merged(found.model_dump(), change)))
        assert predicted.step_s == pytest.approx(other.step_s, rel=0.1)


def merged(tree: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    deeper = {key: merged(tree[key], value) if isinstance(value, dict) else value for key, value in change.items()}
    return {**tree, **deeper}


def test_noise_does_not_mislead_the_fit(tmp_path: Path) -> None:
    noisy = merged(TRUTH, {"rollout": {"token_s": {"kind": "lognormal", "spread": 0.2}}})
    truth = write_run_files(tmp_path, noisy)
    assert simulate(fit(tmp_path).simulation).step_s == pytest.approx(truth.step_s, rel=0.1)


def test_undetermined_contention_is_a_note(tmp_path: Path) -> None:
    """With one answer at a time the run does not determine the contention."""
    write_run_files(tmp_path, merged(TRUTH, {"rollout": {"concurrency": 1}}))
    found = fit(tmp_path)
    assert found.simulation.rollout.contention == 0
    assert found.simulation.rollout.token_s.mean == pytest.approx(0.02, rel=0.03)
    assert "could not be determined" in found.notes[0]


def test_batches_by_hand() -> None:
    arrivals, tokens = np.array([0.0, 1.0, 1.5, 1.6, 9.0]), np.array([10.0, 10.0, 10.0, 30.0, 10.0])
    # 10 tokens 0-1.1 (window 0.1); at 1.1 only the second is there; then the third and fourth are too many together.
    ends = served(arrivals, tokens, rate=10, batch_tokens=30, window_s=0.1)
    assert ends == pytest.approx([1.1, 2.1, 3.1, 6.1, 10.1])
    assert served(arrivals, tokens, rate=10, batch_tokens=40, window_s=0.1) == pytest.approx([1.1, 2.1, 6.1, 6.1, 10.1])


def test_a_folder_without_measurements_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"without config\.yaml"):
        fit(tmp_path)
    write_run_files(tmp_path, TRUTH)
    text = (tmp_path / "trace.json").read_text().replace("response_tokens", "x")
    (tmp_path / "trace.json").write_text(text)
    with pytest.raises(ConfigError, match="response_tokens"):
        fit(tmp_path)


# --- the command ----------------------------------------------------------------------------------------------------


def command(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["simulate", *arguments], env={"COLUMNS": "120"})


def step_of(output: str) -> float:
    return next(float(line.split()[1]) for line in output.splitlines() if line.split()[:1] == ["step"])


def test_a_measured_run_is_simulated_on_other_machines(tmp_path: Path) -> None:
    truth = write_run_files(tmp_path, TRUTH)
    config = str(tmp_path / "config.yaml")
    same = command(config, "--from", str(tmp_path))
    assert same.exit_code == 0, same.output
    assert step_of(same.output) == pytest.approx(truth.step_s, rel=0.1)
    larger = command(config, "--from", str(tmp_path), "--workers", "64", "--ranks", "8", "--teachers", "4")
    assert step_of(larger.output) < 0.7 * step_of(same.output)
    for part in ("64 workers", "8 ranks", "4 teachers", "trainer idle ratio", "queue: teacher", "busy: learner"):
        assert part in larger.output
    twice = command(config, "rollout.batch_size=48", "--from", str(tmp_path))
    assert step_of(twice.output) > 1.5 * step_of(same.output)
    longer = command(config, "rollout.max_tokens=1024", "--from", str(tmp_path))
    assert "answers of 512 tokens are assumed to have 1024" in longer.stderr
    assert command("--from", str(tmp_path)).stdout == same.stdout  # the run's own configuration
    slow = command("simulation.sync.seconds=20", "--from", str(tmp_path))
    assert step_of(slow.output) == pytest.approx(step_of(same.output) + 19.4, rel=0.02)


def test_a_simulation_file_needs_no_run(tmp_path: Path) -> None:
    path, trace = tmp_path / "plan.yaml", tmp_path / "trace.json"
    path.write_text(yaml.safe_dump({"simulation": TRUTH}))
    result = command(str(path), "--trace", str(trace))
    assert result.exit_code == 0, result.output
    expected = simulate(SimulationConfig.model_validate(TRUTH))
    assert step_of(result.output) == pytest.approx(expected.step_s, rel=0.01)
    events = [event for event in read_trace(trace) if event["ph"] == "X"]
    assert Counter(event["name"] for event in events) == Counter(span.stage for span in expected.spans)


def test_cut_answers_reach_the_new_limit(tmp_path: Path) -> None:
    """Half of them end at 512, half at 51."""
    answers = {"kind": "observed", "mean": 281.5, "spread": 0, "shape": [512 / 281.5, 51 / 281.5]}
    write_run_files(tmp_path, merged(TRUTH, {"steps": 12, "rollout": {"answer_tokens": answers}}))
    found = load_simulation(tmp_path / "config.yaml", ["rollout.max_tokens=1024"], tmp_path)
    assert "512 in the measured run" in found.notes[-1]
    lengths = found.simulation.rollout.answer_tokens
    assert sorted({value * lengths.mean for value in lengths.shape}) == pytest.approx([51, 1024], rel=0.03)
    less = load_simulation(tmp_path / "config.yaml", ["rollout.max_tokens=20"], tmp_path)
    assert less.simulation.rollout.answer_tokens.mean == 20


def test_an_invalid_simulation_is_refused_in_one_line(tmp_path: Path) -> None:
    write_run_files(tmp_path, TRUTH)
    for arguments, reason in (
        ([], "needs a file with the section `simulation:`, or a run (--from)"),
        ([str(tmp_path / "config.yaml")], "gives sizes but no speeds"),
        ([str(tmp_path / "config.yaml"), "--from", str(tmp_path / "other")], "without config.yaml"),
        ([str(tmp_path / "config.yaml"), "simulation.worker=1", "--from", str(tmp_path)], "unknown key worker"),
    ):
        result = command(*arguments)
        assert result.exit_code == 2
        assert reason in result.stderr
        assert len(result.stderr.splitlines()) == 1
