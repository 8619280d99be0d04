"""Needs of a run against machines of many kinds."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from common.config.model import Config
from common.sizing import machine as machine_module
from common.sizing.disk import disk_needs
from common.sizing.machine import (
    GIB,
    RAY_THRESHOLD,
    Gpu,
    Machine,
    available_memory_bytes,
    memory_before_kills_bytes,
    total_memory_bytes,
)
from deploy.cli.main import app
from deploy.docs_tools.sizes import PAGE, qwen3, table
from learner.preflight import needs
from learner.preflight.checks import preflight
from learner.preflight.needs import find_needs
from learner.preflight.report import Report
from tests.support.configs import config_of

LARGE = Machine((Gpu("H100", 79.6, bfloat16=True),) * 8, 900 * GIB, 1000 * GIB)
ON_GPUS = {
    "rollout": {"gpus_per_worker": 1, "workers": 3},
    "teacher": {"gpus": 1},
    "learner": {"gpus_per_rank": 1, "ranks": 4, "zero_stage": 3, "gradient_checkpointing": True},
}
Judge = Callable[..., Report]


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Judge:
    """Findings for a student and teacher of 8B on a machine."""
    monkeypatch.setattr(needs, "read_model_size", lambda model: qwen3("8B"))

    def run(machine: Machine, *, disk_gib: int = 9000, **sections: Any) -> Report:
        monkeypatch.setattr(needs, "gather_machine", lambda **_: machine)
        monkeypatch.setattr(needs, "free_bytes", lambda path: disk_gib * GIB)
        config = config_of(**{**ON_GPUS, **sections})
        return Report(list(find_needs(config, context_tokens=16_000, longest_prompt=500)))

    return run


def machine(*, gpu_gib: float = 79.6, free_gib: int = 900, total_gib: int = 1000) -> Machine:
    return Machine((Gpu("A", gpu_gib, bfloat16=True),), free_gib * GIB, total_gib * GIB)


def test_a_run_that_fits_is_a_table(judge: Judge) -> None:
    report = judge(LARGE)
    lines = [text for _, text in report.summary_lines()]
    assert any(line.startswith("4 x rank ") and " of 78.8 on GPU (weights 3.8, gradients 7.6" in line for line in lines)
    assert any(line.startswith("3 x rollout worker ") for line in lines)
    assert any(line.startswith("teacher ") and "contexts 2.2" in line for line in lines)
    assert "a rank can train sequences of about 40,960 tokens" in lines  # the model's own limit
    assert not report.texts("warning") + report.texts("error")


@pytest.mark.parametrize(
    ("where", "changes", "message"),
    [
        (
            LARGE,
            {"checkpoint": {"every": 5}, "disk_gib": 100},
            r"takes 305\.\d GiB .*checkpoints 274\.6.*, 100\.0 free",
        ),
        (machine(gpu_gib=15), {}, r"a rank needs at least 34\.3 GiB \(weights 3\.8"),
        (LARGE, {"learner": {"gpus_per_rank": 1, "zero_stage": 3}}, r"a rank needs at least 137\.3 GiB"),
        (
            machine(total_gib=300),
            {"learner": {"ranks": 4}},
            r"at least 49\d\.\d GiB of host memory, this machine has 300",
        ),
    ],
    ids=["disk", "small GPU", "one rank", "host"],
)
def test_what_cannot_fit_is_an_error(judge: Judge, where: Machine, changes: dict[str, Any], message: str) -> None:
    assert re.search(message, judge(where, **changes).texts("error")[0])


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (machine(gpu_gib=44.5), "a rank needs about 47.8 GiB, a GPU of this machine has 43.8"),
        (machine(free_gib=4), "of host memory, 4.0 are free here"),
    ],
    ids=["GPU", "host"],
)
def test_what_may_not_fit_is_a_warning(judge: Judge, where: Machine, message: str) -> None:
    report = judge(where)
    assert message in report.texts("warning")[0]
    assert not report.texts("error")


def test_a_disk_too_small_for_checkpoints_by_time_is_a_warning(judge: Judge) -> None:
    report = judge(LARGE, disk_gib=100)
    assert "checkpoints may fail, and an interrupted run may not resume" in report.texts("warning")[0]
    assert not report.texts("error")


def test_memory_is_no_error_where_processes_may_start_elsewhere(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    report = judge(machine(gpu_gib=15, free_gib=1, total_gib=1))
    assert not report.texts("error")
    assert len(report.texts("warning")) == 4  # host, rank, worker, teacher


def test_an_answer_far_beyond_a_ranks_memory_is_an_error(judge: Judge) -> None:
    """Memory for 15,000 tokens is certain to be too little for 30,000, and perhaps enough for 16,000."""
    small = machine(gpu_gib=54)
    (found,) = judge(small, rollout={"gpus_per_worker": 1, "max_tokens": 30_000}).texts("error")
    assert re.search(r"a rank with 53.2 GiB can train sequences of about 1\d,\d{3} tokens; .* has 30,500: more", found)
    perhaps = judge(small, rollout={"gpus_per_worker": 1, "max_tokens": 18_000})
    assert not perhaps.texts("error")
    assert any("a rank needs about" in text for text in perhaps.texts("warning"))


def test_a_process_that_shares_a_gpu_is_judged_by_its_part(judge: Judge) -> None:
    sections = {"rollout": {"gpus_per_worker": 0.5}, "teacher": {"kind": "base"}}
    learner = {"gpus_per_rank": 0.5, "lora": {"rank": 16}, "gradient_checkpointing": True}
    assert not judge(machine(), learner=learner, **sections).texts("error")
    found, _ = judge(machine(gpu_gib=30), learner=learner, **sections).texts("error")
    assert re.match(r"a rank needs at least 15\.\d GiB .*, 0.5 of a GPU of this machine has 14.2", found)


def test_a_machine_without_gpus_does_not_judge_them(judge: Judge) -> None:
    report = judge(Machine((), 900 * GIB, 1000 * GIB))
    assert any("no GPU here" in text for _, text in report.summary_lines())
    assert not report.texts("warning") + report.texts("error")


def test_files_of_a_resumed_run_count(judge: Judge, tmp_path: Path) -> None:
    sections = {
        "run": {"name": "r", "dir": str(tmp_path)},
        "checkpoint": {"every": 0},
        "learner": {"gpus_per_rank": 1, "ranks": 8, "zero_stage": 3},
    }
    needed = sum(disk_needs(config_of(**{**ON_GPUS, **sections}), qwen3("8B")).values())
    assert judge(LARGE, disk_gib=needed // GIB, **sections).texts("error")
    (tmp_path / "r" / "checkpoints").mkdir(parents=True)
    with (tmp_path / "r" / "checkpoints" / "old").open("wb") as file:
        file.truncate(GIB)
    assert not judge(LARGE, disk_gib=needed // GIB, **sections).texts("error")


def test_a_model_that_is_not_here_has_unknown_needs() -> None:
    (line,) = Report(list(find_needs(config_of(student={"model": "nobody/has-this"})))).summary_lines()
    assert line[1].startswith("unknown: no config.json and safetensors files of nobody/has-this")


def full(path: Path) -> int:
    return 0


def test_a_run_onto_a_full_disk_is_refused_before_anything_starts(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"id": "1", "prompt": "Q: a\\nA:", "answer": "b"}\n')
    settings: dict[str, Any] = {
        "run": {"name": "r", "dir": str(tmp_path)},
        "student": {"model": str(tiny_model)},
        "data": {"train": str(tmp_path / "rows.jsonl")},
    }
    config: Config = config_of(**settings)
    assert not preflight(config, offline=True).texts("error")
    monkeypatch.setattr(needs, "free_bytes", full)
    (text,) = preflight(config, offline=True).texts("error")
    assert text.startswith(f"run.dir: {tmp_path}/r takes 0.3 GiB at its fullest")


def test_doctor_prints_the_needs_of_a_configuration(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        f"run: {{name: x, dir: {tmp_path}}}\nstudent: {{model: {tiny_model}}}\ncontext: {{text: c}}\n"
        "data: {train: rows.jsonl}\n"
    )
    result = CliRunner().invoke(app, ["doctor", str(file), "rollout.kv_cache_gib=2"])
    assert "key-value cache 2.0" in result.output
    assert "a rank can train sequences of about 4,096 tokens" in result.output


def test_this_machine_has_less_free_than_in_all() -> None:
    assert 0 < available_memory_bytes() <= total_memory_bytes()


def test_a_run_cannot_use_the_memory_at_which_ray_ends_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that needed 20.8 of 21.7 free GiB was ended by Ray after three steps: 95% of 23.5 GiB were in use."""
    pages = {"MemTotal": 24 * GIB, "MemAvailable": 22 * GIB}
    monkeypatch.setattr(machine_module, "_meminfo", pages.__getitem__)
    monkeypatch.setattr(machine_module, "_read", lambda _: "")
    assert memory_before_kills_bytes() == 22 * GIB - int((1 - 0.95) * 24 * GIB)
    monkeypatch.setenv(RAY_THRESHOLD, "0.5")
    assert memory_before_kills_bytes() == 10 * GIB
    pages["MemAvailable"] = GIB
    assert memory_before_kills_bytes() == 0


def test_the_page_has_the_functions_table() -> None:
    assert table() in PAGE.read_text()
