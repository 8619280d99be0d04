"""The paper's settings as configurations: all load, with the paper's numbers, and a dry run names missing models."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from common.config.loader import load_config
from common.config.model import Config
from common.data.rows import read_rows
from common.evaluation.graders import make_grader
from deploy.cli.main import app
from learner.data.games import environment_error
from tests.support.paths import ROOT

FOLDER = ROOT / "deploy/configs/paper"
MATH = ("math-8b", "math-8b-4b", "math-8b-1.7b")
OEL = ("oel-frozen-lake-1.7b", "oel-sokoban-4b")
GAMES = ("frozen-lake-1.7b", "sokoban-4b", *OEL)
SYSTEM = tuple(f"{task}-{model}" for task in ("medical", "safety") for model in ("llama-8b", "llama-3b", "qwen-7b"))

BY_TASK = {  # answer tokens, temperature of rollouts and evaluation, top-p of the evaluation, tokens of a context
    **dict.fromkeys(MATH, (16_384, 0.6, 0.95, 16_384)),
    **dict.fromkeys(GAMES, (1_024, 0.7, 0.8, 8_192)),
    **dict.fromkeys(SYSTEM, (512, 1.0, 0.95, None)),
}
STUDENTS = {
    "math-8b": "Qwen/Qwen3-8B",
    "math-8b-4b": "Qwen/Qwen3-4B",
    "math-8b-1.7b": "Qwen/Qwen3-1.7B",
    "frozen-lake-1.7b": "Qwen/Qwen3-1.7B",
    "sokoban-4b": "Qwen/Qwen3-4B-Instruct-2507",
    "oel-frozen-lake-1.7b": "Qwen/Qwen3-1.7B",
    "oel-sokoban-4b": "Qwen/Qwen3-4B-Instruct-2507",
}
OEL_BY_TASK = {  # steps, learning rate, problems of a series, tokens of a context
    "oel-frozen-lake-1.7b": (20, 5e-6, 15, 2_048),
    "oel-sokoban-4b": (100, 1e-6, 50, 8_192),
}
FIGURES = {  # accuracy: base, in context, off-policy, OPCD
    "math-8b": "75.0 79.0 79.5 80.9",
    "frozen-lake-1.7b": "6.3 31.4 35.2 38.3",
    "sokoban-4b": "9.4 48.4 51.6 53.9",
    "medical-llama-8b": "68.4 72.2 75.2 76.7",
    "medical-llama-3b": "59.4 66.4 71.0 76.3",
    "medical-qwen-7b": "46.4 52.6 58.5 62.3",
    "safety-llama-8b": "70.7 75.3 77.2 79.6",
    "safety-llama-3b": "30.7 69.5 83.3 83.1",
    "safety-qwen-7b": "69.1 72.7 77.0 78.1",
}


def preset(name: str) -> Config:
    return load_config(FOLDER / f"{name}.yaml")


def test_there_is_one_for_every_setting() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {*BY_TASK, "coach-8b"}


def test_the_coachs_numbers() -> None:
    config = preset("coach-8b")
    rollout, loss, learner = config.rollout, config.loss, config.learner
    assert (rollout.batch_size, rollout.samples_per_prompt, rollout.max_tokens) == (256 + 64, 8, 4096)
    assert (rollout.temperature, rollout.top_p, loss.temperature) == (1.0, 1.0, 1.0)
    assert (loss.form, loss.direction, loss.top_k) == ("raw", "reverse", 256)
    assert (learner.steps, learner.lr, learner.lr_schedule) == (300, 1e-6, "constant")
    assert (config.teacher.kind, config.teacher.refresh_every) == ("live", 30)
    (general,) = config.data.mix.values()
    assert general.share * rollout.batch_size == 64
    assert general.teacher is not None
    assert config.teachers[general.teacher].kind == "frozen"
    assert config.context.from_rollout == "deploy.tasks.coach:insights"


@pytest.mark.parametrize("name", BY_TASK)
def test_the_papers_numbers(name: str) -> None:
    config = preset(name)
    tokens, temperature, top_p, context_tokens = BY_TASK[name]
    rollout, loss, learner = config.rollout, config.loss, config.learner
    assert (rollout.batch_size, rollout.samples_per_prompt, rollout.top_p) == (64 if name in OEL else 128, 1, 1.0)
    assert (rollout.max_tokens, rollout.temperature) == (tokens, temperature)
    assert rollout.max_staleness == 0
    assert (loss.form, loss.direction, loss.support) == (
        "renorm" if name == "safety-llama-8b" else "raw",
        "reverse",
        "student",
    )
    assert (loss.top_k, loss.temperature) == (256, temperature)
    steps, lr, problems, context_tokens = OEL_BY_TASK.get(name, (50, 5e-6, 30, context_tokens))
    assert (learner.steps, learner.lr, learner.lr_schedule) == (steps, lr, "constant")
    assert (learner.betas, learner.weight_decay) == ((0.9, 0.999), 0.01)
    assert (learner.grad_clip, learner.warmup_steps) == (1.0, 0)
    assert (config.eval.temperature, config.eval.top_p, config.eval.top_k) == (temperature, top_p, 20)
    assert config.teacher.kind == "frozen"
    if context_tokens is not None:
        settings = config.experience
        assert (settings.seeds, settings.problems, settings.max_context_tokens) == (10, problems, context_tokens)
        assert (settings.select, settings.keep) == (("random", 10) if name in OEL else ("validation", 1))
        assert config.context.pool == config.run.path / "experience/selected.jsonl"
    make_grader(config.eval.grader)


@pytest.mark.parametrize("name", BY_TASK)
def test_who_learns_from_whom_thinking_or_not(name: str) -> None:
    config = preset(name)
    thinks = name in MATH or "frozen-lake" in name
    assert config.student.chat_template_kwargs == ({"enable_thinking": True} if thinks else {})
    assert config.student.model == STUDENTS.get(name, config.student.model)
    if name in MATH:
        assert config.teacher_model == config.experience.model == "Qwen/Qwen3-8B"
    else:
        assert config.teacher_model == config.student.model


@pytest.mark.parametrize("name", BY_TASK)
def test_three_sets_that_are_not_the_same(name: str) -> None:
    data = preset(name).data
    assert len({data.train, data.valid, data.eval, None}) == 4


@pytest.mark.parametrize("name", GAMES)
def test_games_of_the_three_sets_share_no_seed(name: str) -> None:
    config = preset(name)
    data = config.data
    assert (config.environment.max_turns, config.environment.sample_format) == (5, "observation")
    assert data.valid is not None
    assert data.eval is not None
    seeds = [{row.seed for row in read_rows(source, data)} for source in (data.train, data.valid, data.eval)]
    games = config.learner.steps * config.rollout.batch_size
    assert [len(one) for one in seeds] == [games, 128, 128]  # every step plays games that were never played before
    assert len(set.union(*seeds)) == games + 128 + 128
    assert environment_error(read_rows(data.eval, data)[0]) is None


@pytest.mark.parametrize("name", SYSTEM)
def test_a_system_prompt_asks_for_the_tag_that_is_graded(name: str) -> None:
    config = preset(name)
    assert config.context.placement == "system"
    assert config.context.file is not None
    text = (ROOT / config.context.file).read_text(encoding="utf-8")
    assert len(text) > 500
    answers = ("A", "C") if "medical" in name else ("yes", "no")
    assert any(f"<answer>{answer}</answer>" in text for answer in answers)
    assert (config.eval.grader, config.eval.samples) == ("answer_tag", 2)


@pytest.mark.parametrize("name", FIGURES)
def test_the_papers_results_stand_in_the_comment(name: str) -> None:
    comment = [line for line in (FOLDER / f"{name}.yaml").read_text().splitlines() if line.startswith("#")]
    assert all(figure in " ".join(comment) for figure in FIGURES[name].split())


def test_the_files_have_what_the_machine_needs_and_no_line_that_is_too_long() -> None:
    for name in (*BY_TASK, "coach-8b"):
        config = preset(name)
        gpus = sum(teacher.gpus for teacher in config.named_teachers().values())
        gpus += config.rollout.workers * config.rollout.gpus_per_worker
        assert gpus + config.learner.ranks * config.learner.gpus_per_rank == 8
        assert max(map(len, (FOLDER / f"{name}.yaml").read_text().splitlines())) <= 120


@pytest.mark.parametrize("name", GAMES)
def test_a_dry_run_says_that_the_pool_and_the_model_are_not_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("RAY_ADDRESS", "auto")  # for a cluster: the GPUs are not here
    result = CliRunner().invoke(app, ["train", str(FOLDER / f"{name}.yaml"), "run.dir=nowhere", "--dry-run"])
    assert result.exit_code == 2, result.output
    model, pool = result.stderr.splitlines()
    run = name if name in OEL else f"paper-{name}"
    assert pool.startswith(f"opcd: context.pool: cannot read runs/{run}/experience/selected.jsonl")
    assert "opcd experience select" in pool
    assert model.startswith(f"warning: student.model {STUDENTS[name]} is not on this machine")


def test_a_dry_run_says_by_name_which_data_sets_are_not_there_and_fetches_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HOME": str(tmp_path), "RAY_ADDRESS": "auto"}
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(
        [sys.executable, "-m", "deploy.cli.main", "train", FOLDER / "safety-qwen-7b.yaml", "--dry-run"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    model, *sets = done.stderr.splitlines()
    assert [line.removeprefix("opcd: ").split(":")[0] for line in sets] == ["data.train", "data.valid", "data.eval"]
    for line, part in zip(sets, ("train", "train", "test"), strict=True):
        assert f"ytz20/sys_safety_{part} not found" in line
        assert str(tmp_path) in line
        assert "OfflineModeIsEnabled" in line
    assert model.startswith("warning: student.model Qwen/Qwen2.5-7B-Instruct is not on this machine")


def staged(folder: Path, name: str) -> None:
    """Stand-ins for the hub's data sets, with the columns that the paper's code reads, and for a written pool."""
    from datasets import Dataset

    data = preset(name).data
    for source in {str(one).split("/train")[0].removeprefix("hf:") for one in (data.train, data.valid, data.eval)}:
        rows: dict[str, list[object]] = {
            "content": [[{"role": "user", "content": f"Question {number}?"}] for number in range(1100)]
        }
        if name in MATH:
            rows["reward_model"] = [{"ground_truth": "7", "style": "rule"} for _ in range(1100)]
        else:
            rows["answer"] = ["B" if "medical" in name else "yes"] * 1100
        (folder / source).mkdir(parents=True)
        Dataset.from_dict(rows).to_parquet(folder / source / "train.parquet")
    pool = preset(name).context.pool
    if pool is not None:
        (folder / pool).parent.mkdir(parents=True)
        (folder / pool).write_text('{"id": "0", "text": "- EXPERIENCE ITEM: read the question twice."}\n')
    (folder / "deploy").symlink_to(ROOT / "deploy")


@pytest.mark.parametrize("name", ["medical-llama-3b", "safety-qwen-7b", "math-8b-4b"])
def test_with_data_sets_of_the_papers_columns_a_dry_run_passes(
    name: str, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged(tmp_path, name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    small = [f"student.model={tiny_model}", "student.max_sequence_tokens=2048", "student.chat_template_kwargs={}"]
    small += ["teacher.model=null", "teacher.max_sequence_tokens=2048", "rollout.max_tokens=16", "loss.top_k=64"]
    result = CliRunner().invoke(app, ["train", str(FOLDER / f"{name}.yaml"), *small, "--dry-run"])
    assert result.exit_code == 0, result.output + result.stderr
    config = preset(name)
    for source, answers in ((config.data.train, False), (config.data.valid, True), (config.data.eval, True)):
        assert source is not None
        assert read_rows(source, config.data, need_answers=answers)
