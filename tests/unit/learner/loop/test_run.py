"""The ways out of a run: interrupted, failed, resumed. Its services are stand-ins; `tests.e2e` has the real ones."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from common.config.loader import load_config
from common.config.model import Config
from common.protocol.scoring import TeacherError
from common.telemetry.run_files import Progress, RunFiles
from common.telemetry.trace import TraceFile, TraceSpan, read_trace
from learner.data.inputs import read_inputs
from learner.loop import run as run_module
from learner.loop.checkpoints import Checkpoints
from learner.loop.run import Resumed, Run
from learner.trainer.reports import LearnerInfo, StepReport
from tests.support.runs import write_run
from tests.support.stub_loop import OrderedServices, StubPublisher


class Actors(OrderedServices):
    """Services of one process of a run. `at` is called when the optimiser or a rollout of a step begins."""

    def __init__(self, at: Callable[[str, int], None]) -> None:
        super().__init__()
        self.at = at
        self.learner_info = LearnerInfo(0, 1, "cpu", "float32", 0, 1, 512, (), 0)
        self.teachers = SimpleNamespace(
            watch=self._idle,
            begin=lambda placement: None,
            connect=self._connect,
            metrics_pages=dict,
            longest_tokens=None,
            fingerprints=lambda: {"default": "f"},
            vocab_sizes=dict,
        )
        self.placement = None

    def __getattr__(self, name: str) -> Any:
        if name in ("start_workers", "wait_ranks", "clock_warning"):
            return self._nothing
        return lambda *_, **__: None  # reserve, begin_ranks, invite_workers, close

    async def _nothing(self, *_: Any) -> None: ...

    async def _connect(self, *_: Any, **__: Any) -> None: ...

    async def rollout(self, sample: Any, output: str) -> tuple[Any, Any]:
        self.at("rollout", self.version + 1)
        return await super().rollout(sample, output)

    async def finish_step(self, tokens: int, sequences: int) -> list[StepReport]:
        self.at("optimiser", self.version + 1)
        await asyncio.sleep(0.05)
        self.version += 1
        metrics = {"kl/lower_bound": 1.0, "grad_norm": 1.0, "mismatch/rms": 0.0, "mismatch/outside": 0.0}
        return [StepReport(self.version, True, 0, metrics)]

    async def weight_version(self) -> int:
        return self.version

    async def save(self, folder: str) -> None:
        write(Path(folder) / "model.safetensors", str(self.version))

    async def save_state(self, folder: str, *, drop_step: bool) -> None:
        write(Path(folder) / "state", str(self.version))

    async def load_state(self, folder: str) -> None:
        self.version = int((Path(folder) / "state").read_text())


class Publisher(StubPublisher):
    async def begin(self, prompts: Any) -> Any:
        return SimpleNamespace(max_nats=0.0)

    def take_spans(self) -> list[TraceSpan]:
        return []


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path) -> Config:
    path = write_run(tmp_path, tiny_model, eval={"every": 0})
    return load_config(path, ["data.eval=null", "learner.steps=5", "rollout.batch_size=4"])


def execute(config: Config, monkeypatch: pytest.MonkeyPatch, at: Callable[[str, int], None], *, resume: bool) -> None:
    """One process of the run, as `learner.train` runs it."""
    newest = Checkpoints(config.run.path / "checkpoints", 2).newest() if resume else None
    assert (newest is not None) == resume
    resumed = Resumed(*newest) if newest else None
    monkeypatch.setattr(run_module, "Services", lambda _: Actors(at))
    monkeypatch.setattr(run_module, "WeightPublisher", lambda *_: cast(Any, Publisher()))
    trace_bytes = resumed.manifest.loop["trace_bytes"] if resumed else None
    with (
        RunFiles(config.run.path, resumed.manifest.step if resumed else None) as files,
        TraceFile(config.run.path / "trace.json", resume_at=trace_bytes) as trace,
        Progress() as progress,
    ):
        asyncio.run(Run(config, read_inputs(config), files, trace, progress, resumed).run())


def summary(config: Config) -> dict[str, Any]:
    return dict(json.loads((config.run.path / "summary.json").read_text()))


def steps_of(config: Config) -> list[tuple[int, int]]:
    lines = [json.loads(line) for line in (config.run.path / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["run/part"]) for line in lines if "run/part" in line]


def test_timeline_and_token_records_of_a_long_run_leave_steps_out(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []

    def keeps(step: int, answers: int) -> bool:
        asked.append((step, answers))
        return step != 3

    monkeypatch.setattr(run_module, "keeps_trace", keeps)
    written: list[int] = []
    monkeypatch.setattr(run_module, "keeps_details", lambda step, whole: step != 2)
    monkeypatch.setattr(run_module.TokenRecordFiles, "add_records", lambda self, version, _: written.append(version))
    execute(config, monkeypatch, lambda stage, step: None, resume=False)
    assert written == [1, 3, 4, 5]
    assert asked == [(step, 4) for step in range(1, 6)]
    events = read_trace(config.run.path / "trace.json")
    assert [event["args"]["version"] for event in events if event["name"] == "step"] == [1, 2, 4, 5]
    assert [step for step, _ in steps_of(config)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(("moment", "kept"), [("rollout", 2), ("optimiser", 3)])
def test_an_interrupted_run_goes_on_where_it_was(
    config: Config,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    moment: str,
    kept: int,
) -> None:
    """An interrupt among the rollouts of step 3 drops it; once the optimiser runs, the step is finished first."""
    sent: list[str] = []

    def interrupt(stage: str, step: int) -> None:
        if (stage, step) == (moment, 3) and not sent:
            sent.append(stage)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        execute(config, monkeypatch, interrupt, resume=False)
    assert summary(config)["outcome"] == "interrupted"
    assert summary(config)["steps"] == kept
    assert (config.run.path / "checkpoint/model.safetensors").read_text() == str(kept)
    assert f"to go on from step {kept}: opcd train" in capsys.readouterr().out
    first_part_s = summary(config)["time_s"]["total"]

    execute(config, monkeypatch, lambda stage, step: None, resume=True)
    found = summary(config)
    assert (found["outcome"], found["steps"]) == ("finished", 5)
    assert (config.run.path / "checkpoint/model.safetensors").read_text() == "5"
    assert steps_of(config) == [(step, 1 if step <= kept else 2) for step in range(1, 6)]
    assert found["time_s"]["total"] > first_part_s
    assert found["time_s"]["start"] < found["time_s"]["total"]
    audit = [json.loads(line) for line in (config.run.path / "audit.jsonl").read_text().splitlines()]
    trained = Counter(sample for line in audit for sample in line["trained"])
    assert set(trained.values()) == {1}
    assert len(trained) == 5 * 4
    spans = Counter(
        event["args"].get("version") for event in read_trace(config.run.path / "trace.json") if event["name"] == "step"
    )
    assert spans == Counter(range(1, 6))


def test_a_failed_run_keeps_its_last_whole_step(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(stage: str, step: int) -> None:
        if (stage, step) == ("rollout", 4):
            raise TeacherError("the teacher is gone")

    with pytest.raises(TeacherError):
        execute(config, monkeypatch, fail, resume=False)
    assert "to go on from step 3: opcd train" in capsys.readouterr().out
    execute(config, monkeypatch, lambda stage, step: None, resume=True)
    assert steps_of(config) == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2)]
