"""Sinks: a Prometheus page that is really scraped, and the calls to trackers."""

from __future__ import annotations

import math
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from common.config.model import Config, ConfigError
from common.telemetry.prometheus import PrometheusSink, gauge_name
from common.telemetry.run_files import TABLE_ROWS, RunFiles
from common.telemetry.sinks import open_sinks


def config(folder: Path, **run: Any) -> Config:
    return Config.model_validate(
        {
            "run": {"name": "r", "dir": folder, **run},
            "student": {"model": "m"},
            "context": {"text": "c"},
            "data": {"train": "t"},
        }
    )


class Recorded:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.written: list[tuple[int, dict[str, float]]] = []
        self.closed = 0

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.written.append((step, dict(values)))

    def close(self) -> None:
        self.closed += 1


def scraped(url: str) -> dict[str, float]:
    """Values of the run `r` by name; the text must be Prometheus' own."""
    text = httpx.get(url, trust_env=False).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    assert all(sample.labels == {"run": "r"} for sample in samples)
    return {sample.name: sample.value for sample in samples}


def test_numbers_reach_every_sink_and_texts_do_not(tmp_path: Path) -> None:
    first, second = Recorded(), Recorded()
    with RunFiles(tmp_path, sinks=[first, second]) as files:
        files.metrics(3, {"kl": 0.5, "note": "x", "n": 2})
        assert first.written == second.written == [(3, {"kl": 0.5, "n": 2})]
        assert first.closed == 0
    assert first.closed == second.closed == 1


def test_a_run_asks_for_no_sink_by_default(tmp_path: Path) -> None:
    assert list(open_sinks(config(tmp_path), resume=False)) == []


def test_gauges_show_the_newest_value_of_each_number() -> None:
    sink = PrometheusSink("r", "127.0.0.1", 0)
    try:
        sink.write(1, {"kl/lower_bound": 0.5, "accuracy/base": 0.25})
        sink.write(2, {"kl/lower_bound": 0.125, "time/wait_ratio/rollout": math.inf})
        found = scraped(sink.url)
    finally:
        sink.close()
    assert found.pop("opcd_run_updated_timestamp_seconds") == pytest.approx(time.time(), abs=60)
    assert found == {
        "opcd_run_step": 2,
        "opcd_run_kl_lower_bound": 0.125,
        "opcd_run_accuracy_base": 0.25,
        "opcd_run_time_wait_ratio_rollout": math.inf,
    }


def test_pages_of_a_runs_teachers_are_shown_with_its_own() -> None:
    page = """# TYPE opcd_teacher_requests_total counter
opcd_teacher_requests_total{run="run/r",status="200"} 3.0
# TYPE opcd_teacher_queued_tokens gauge
opcd_teacher_queued_tokens 7.0
"""

    def silent() -> str:
        raise OSError("no answer")

    sink = PrometheusSink("r", "127.0.0.1", 0)
    try:
        sink.write(1, {"kl": 0.5})
        for teacher, read in (("first", lambda: page), ("gone", silent), ("second", lambda: page)):
            sink.relay(teacher, read)
        text = httpx.get(sink.url, trust_env=False).raise_for_status().text
    finally:
        sink.close()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    found = {(s.name, s.labels.get("teacher")): (s.value, s.labels.get("run")) for s in samples}
    assert found[("opcd_run_kl", None)] == (0.5, "r")
    for teacher in ("first", "second"):
        assert found[("opcd_teacher_requests_total", teacher)] == (3.0, "run/r")
        assert found[("opcd_teacher_queued_tokens", teacher)] == (7.0, None)
    assert not any(teacher == "gone" for _, teacher in found)


def test_the_port_is_free_again_after_a_run() -> None:
    sink = PrometheusSink("r", "127.0.0.1", 0)
    port = int(httpx.URL(sink.url).port or 0)
    sink.close()
    again = PrometheusSink("r", "127.0.0.1", port)
    again.close()


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"run\.metrics_port.*127\.0\.0\.1:{port}"):
            open_sinks(config(tmp_path, metrics_port=port), resume=False)


def test_names_are_those_of_prometheus() -> None:
    assert gauge_name("time/wait_ratio/rollout") == "opcd_run_time_wait_ratio_rollout"
    assert gauge_name("a  b-c/") == "opcd_run_a_b_c"


@pytest.mark.parametrize(("key", "package"), [("wandb", "wandb"), ("mlflow", "mlflow")])
def test_a_package_that_is_missing_is_named(
    key: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"run\.{key} needs the package {package}.*pip install {package}"):
        open_sinks(config(tmp_path, **{key: "p"}), resume=False)


def test_what_was_opened_is_closed_when_the_next_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="wandb"):
        open_sinks(config(tmp_path, metrics_port=port, wandb="p"), resume=False)
    socket.create_server(("127.0.0.1", port)).close()


class FakeWandb(ModuleType):
    """The part of wandb that is called; a run has the id it was given, or ``new``."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.started: list[dict[str, Any]] = []
        self.logged: list[dict[str, float]] = []
        self.finished = 0

    def init(self, **arguments: Any) -> Any:
        self.started.append(arguments)
        return SimpleNamespace(
            id=arguments["id"] or "new",
            define_metric=lambda name, step_metric: self.started[-1].update(axis=step_metric),
            log=self.logged.append,
            finish=lambda: setattr(self, "finished", self.finished + 1),
        )


def test_wandb_gets_each_step_and_a_resumed_run_is_the_same_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for resume in (False, True, False):
        (sink,) = open_sinks(config(tmp_path, wandb="team/project"), resume=resume)
        sink.write(7, {"kl": 0.5})
        sink.close()
    assert [start["id"] for start in wandb.started] == [None, "new", None]
    assert {(start["entity"], start["project"], start["name"], start["axis"]) for start in wandb.started} == {
        ("team", "project", "r", "step")
    }
    assert wandb.started[0]["config"]["run"]["name"] == "r"
    assert wandb.logged == [{"step": 7, "kl": 0.5}] * 3
    assert wandb.finished == 3


ANSWERS = [{"id": "a", "right": True, "answer": "yes"}, {"id": "b", "right": False, "answer": "né", "context_id": "c"}]


def test_wandb_gets_a_table_of_held_out_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = FakeWandb()
    wandb.Table = lambda columns, data: (columns, data)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with RunFiles(tmp_path / "run", sinks=open_sinks(config(tmp_path, wandb="p"), resume=False)) as files:
        files.end_of_samples(1, "base")  # no answers, no table
        for answer in ANSWERS * (TABLE_ROWS // 2 + 1):
            files.sample({"step": 2, **answer})
        files.end_of_samples(2, "valid")
        files.sample({"step": 3, **ANSWERS[0]})
        files.end_of_samples(3, "final")
    first, second = (found for found in wandb.logged if any(name.startswith("samples/") for name in found))
    columns, data = first["samples/valid"]  # type: ignore[misc]
    assert columns == ["step", "id", "right", "answer", "context_id"]
    assert len(data) == TABLE_ROWS
    assert data[:2] == [["2", "a", "true", "yes", "null"], ["2", "b", "false", "né", "c"]]
    assert second["samples/final"][1] == [["3", "a", "true", "yes"]]  # type: ignore[index]


@pytest.mark.parametrize("fault", [None, "refused", "no pandas"])
def test_mlflow_gets_a_table_and_a_fault_costs_the_table_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str | None
) -> None:
    mlflow = FakeMlflow()

    def log_table(data: dict[str, list[str]], artifact_file: str) -> None:
        if fault is not None:
            raise FakeMlflow.Refused("down") if fault == "refused" else ImportError("pandas")
        mlflow.calls.append(("table", data["answer"], artifact_file))

    mlflow.log_table = log_table  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    with RunFiles(tmp_path / "run", sinks=open_sinks(config(tmp_path, mlflow="e"), resume=False)) as files:
        for answer in ANSWERS:
            files.sample({"step": 2, **answer})
        files.end_of_samples(2, "ood/other")
    tables = [call for call in mlflow.calls if call[0] == "table"]
    assert tables == ([] if fault else [("table", ["yes", "né"], "samples/ood-other-000002.json")])
    assert ("answers of ood/other" in caplog.text) == (fault is not None)


class FakeMlflow(ModuleType):
    """The part of mlflow that is called."""

    class Refused(Exception):
        """Stands for MlflowException."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.exceptions = SimpleNamespace(MlflowException=self.Refused)
        self.calls: list[tuple[Any, ...]] = []
        self.down = False

    def get_tracking_uri(self) -> str:
        return "http://tracker"

    def set_tracking_uri(self, uri: str) -> None:
        self.calls.append(("uri", uri))

    def set_experiment(self, name: str) -> None:
        if self.down:
            raise self.Refused("down")
        self.calls.append(("experiment", name))

    def start_run(self, run_id: str | None, run_name: str) -> Any:
        self.calls.append(("start", run_id, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id or "new"))

    def log_dict(self, value: dict[str, Any], name: str) -> None:
        self.calls.append(("config", value["run"]["name"], name))

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        if self.down:
            raise self.Refused("down")
        self.calls.append(("metrics", values, step))

    def end_run(self) -> None:
        self.calls.append(("end",))


def test_mlflow_gets_each_step_and_a_resumed_run_is_the_same_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    for resume in (False, True):
        (sink,) = open_sinks(config(tmp_path, mlflow="e", mlflow_uri="http://t"), resume=resume)
        sink.write(7, {"kl": 0.5})
        sink.close()
    every = [("uri", "http://t"), ("experiment", "e")]
    steps = [("metrics", {"kl": 0.5}, 7), ("end",)]
    assert mlflow.calls == [
        *every, ("start", None, "r"), ("config", "r", "config.yaml"), *steps,
        *every, ("start", "new", "r"), *steps,
    ]  # fmt: skip


def test_a_tracker_that_goes_away_costs_its_curves_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mlflow = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    (sink,) = open_sinks(config(tmp_path, mlflow="e"), resume=False)
    mlflow.down = True
    sink.write(7, {"kl": 0.5})
    assert "step 7" in caplog.text
    with pytest.raises(ConfigError, match=r"run\.mlflow: http://tracker"):
        open_sinks(config(tmp_path, mlflow="e"), resume=False)
