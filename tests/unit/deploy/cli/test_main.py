"""The ``opcd`` command line: output, refusals and exit statuses. Starts no engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from common.config.loader import load_config
from common.telemetry.run_folder import owned
from deploy.cli.main import app
from teacher_server.http.auth import NotAuthorised, read_keys
from tests.support.paths import ROOT


@pytest.fixture
def path(tmp_path: Path, tiny_model: Path) -> Path:
    """A run whose data is there and whose model can be loaded."""
    for name, words in (("train", ("cat", "sun", "map")), ("eval", ("cup", "hat"))):
        rows = [json.dumps({"id": word, "prompt": f"Q: {word}\nA:", "answer": f"{word}s"}) for word in words]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    settings = {
        "run": {"name": "small", "dir": str(tmp_path / "runs")},
        "student": {"model": str(tiny_model)},
        "context": {"text": "Q: dog\nA: dogs\n"},
        "data": {"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "eval.jsonl")},
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def opcd(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refusal(result: Result) -> str:
    """The one line that a refused command ends in, on stderr, with exit status 2."""
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("opcd: ")
    return lines[0]


def test_help_names_every_command() -> None:
    result = opcd("--help")
    assert result.exit_code == 0
    for command in ("train", "teacher", "evaluate", "prepare", "doctor"):
        assert command in result.stdout


def test_a_dry_run_refuses_the_folder_of_another_run(path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs/small"
    with owned(folder):
        assert "in use by another run" in refusal(opcd("train", path, "--dry-run"))
    (folder / "summary.json").write_text('{"outcome": "finished"}')
    assert "holds a finished run" in refusal(opcd("train", path, "--dry-run"))
    assert opcd("train", path, "--dry-run", "--overwrite").exit_code == 0
    assert (folder / "summary.json").exists()


def test_a_finished_run_has_nothing_to_resume(path: Path, tmp_path: Path) -> None:
    """Said without loading anything heavy."""
    folder = tmp_path / "runs/small"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text('{"outcome": "finished"}')
    (folder / "metrics.jsonl").write_text('{"step": 3}\n')
    (folder / "run.lock").touch()
    for more in ([], ["--dry-run"]):
        result = opcd("train", path, "learner.steps=3", "--resume", *more)
        assert (result.exit_code, result.stderr) == (0, "")
        assert f"{folder} is finished, 3 of 3 steps: nothing to resume" in result.stdout
    arguments = ["train", str(path), "learner.steps=3", "--resume"]
    code = f"import sys; from deploy.cli.main import app; app({arguments}, standalone_mode=False); "
    code += "assert not {'ray', 'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    refused = refusal(opcd("train", path, "learner.steps=4", "--resume", "--dry-run"))
    assert "no checkpoint under" in refused


def test_print_config_prints_the_resolved_whole_and_starts_nothing(path: Path, tmp_path: Path) -> None:
    result = opcd("train", path, "learner.lr=1e-5", "run.seed=7", "--print-config")
    assert result.exit_code == 0, result.output
    printed = tmp_path / "printed.yaml"
    printed.write_text(result.stdout)
    assert load_config(printed) == load_config(path, ["learner.lr=1e-5", "run.seed=7"])
    assert not (tmp_path / "runs").exists()


def test_dry_run_is_a_short_summary_and_starts_nothing(path: Path, tmp_path: Path) -> None:
    result = opcd("train", path, "rollout.batch_size=6", "learner.steps=2", "rollout.max_tokens=8", "--dry-run")
    assert result.exit_code == 0, result.output
    facts = dict(line.split(None, 1) for line in result.stdout.splitlines())
    assert facts["rows"] == "3 train, 2 eval"
    # Byte-level tokens: the context has 15 of them, the longest prompt ("Q: cat\nA:") 9.
    assert facts["prompts"] == "student 9 tokens, teacher 24 tokens with the context"
    assert facts["work"] == "2 steps of 6 answers, 4.0 passes over the rows, at most 96 sampled tokens"
    assert len(facts) < 16
    assert result.stderr == ""
    assert not (tmp_path / "runs").exists()


def test_dry_run_without_the_model_reads_the_rows(path: Path) -> None:
    result = opcd("train", path, "student.model=some/name", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "warning: student.model some/name is not on this machine" in result.stderr
    assert "rows are not rendered" in result.stderr
    assert "3 train, 2 eval" in result.stdout


@pytest.mark.parametrize("command", ["train", "evaluate"])
@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("learner.stesp=3", "did you mean learner.steps?"),
        ("learner.lr=-1", "bad value learner.lr=-1"),
        ("learner.lr", "expected section.key=value"),
    ],
)
def test_a_bad_configuration_is_one_line(path: Path, command: str, override: str, part: str) -> None:
    assert part in refusal(opcd(command, path, override))


@pytest.mark.parametrize("command", ["train", "teacher", "evaluate"])
def test_a_missing_file_is_one_line(command: str, tmp_path: Path) -> None:
    assert "cannot read" in refusal(opcd(command, tmp_path / "none.yaml"))


def test_a_teacher_without_a_model_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "teacher.yaml"
    path.write_text("teacher: {port: 8001}")
    assert "teacher.model is missing" in refusal(opcd("teacher", path))


def test_a_bad_row_is_named_by_file_and_line(path: Path, tmp_path: Path) -> None:
    rows = tmp_path / "train.jsonl"
    rows.write_text('{"id": "a", "prompt": "Q"}\n{"id": "a", "prompt": "Q"}\n')
    assert f"{rows}:2: " in refusal(opcd("train", path, "--dry-run"))


def test_a_missing_context_is_one_line(path: Path) -> None:
    result = opcd("train", path, "context.text=null", "context.file=none.txt", "--dry-run")
    assert "context.file: cannot read none.txt" in refusal(result)


def test_a_dry_run_names_everything_that_is_missing_at_once(path: Path) -> None:
    overrides = ["data.train=none.jsonl", "data.eval=hf:no-split", "context.text=null", "context.file=none.txt"]
    result = opcd("train", path, *overrides, "teacher.model=some/teacher", "--dry-run")
    assert result.exit_code == 2
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("warning: teacher.model some/teacher is not on this machine")
    assert lines[1].startswith("opcd: context.file: cannot read none.txt")
    assert lines[2].startswith("data.train: cannot read none.jsonl")
    assert lines[3].startswith("data.eval: data source hf:no-split")


def test_every_prompt_that_does_not_fit_is_a_line_with_its_numbers(path: Path) -> None:
    result = opcd("train", path, "student.max_sequence_tokens=16", "rollout.max_tokens=8", "--dry-run")
    assert result.exit_code == 2
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 5
    assert "row 'cat': 17 student tokens (9 of prompt, 8 of answer), at most 16" in lines[0]


def test_a_checkpoint_that_is_none_is_one_line(path: Path, tmp_path: Path) -> None:
    assert "not a model folder (no config.json)" in refusal(opcd("evaluate", path, "--checkpoint", tmp_path))


def test_a_new_key_opens_the_teacher_whose_file_holds_its_line(tmp_path: Path) -> None:
    result = opcd("key", "team-a", "--out", tmp_path / "key")
    assert result.exit_code == 0, result.output
    secret = (tmp_path / "key").read_text().strip()
    assert secret not in result.output
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    (tmp_path / "keys").write_text(result.stdout)
    known = read_keys(tmp_path / "keys")
    assert known.tenant(f"Bearer {secret}") == "team-a"
    with pytest.raises(NotAuthorised):
        known.tenant("Bearer another")


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("in use")
    assert "exists already, and a key in use is never replaced" in refusal(
        opcd("key", "team-a", "--out", tmp_path / "key")
    )
    assert (tmp_path / "key").read_text() == "in use"


def test_a_tenant_that_the_key_file_could_not_hold_is_refused() -> None:
    assert "team a" in refusal(opcd("key", "team a"))


def test_prepare_leaves_a_model_alone(tiny_model: Path) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in tiny_model.iterdir()}
    result = opcd("prepare", "smollm2", "--out", tiny_model)
    assert result.exit_code == 0
    assert "exists already" in result.stdout
    assert {file.name: file.stat().st_mtime_ns for file in tiny_model.iterdir()} == before


def test_prepare_does_not_write_into_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert "not a model folder" in refusal(opcd("prepare", "smollm2", "--out", tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_a_missing_argument_shows_the_usage() -> None:
    result = opcd("train")
    assert result.exit_code == 2
    assert "Missing argument 'CONFIG'" in result.stderr


def test_the_demo_passes_a_dry_run(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a model that is here in a clean checkout, too."""
    monkeypatch.chdir(ROOT)
    model = f"student.model={tiny_model}"
    result = opcd("train", "deploy/configs/demo.yaml", "run.name=never-run", model, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "200 train, 32 valid, 64 eval" in result.stdout


def test_the_start_for_ones_own_rows_passes_a_dry_run(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the files that its comments ask for, in both forms of rows."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "context.txt").write_text("Answer with the plural.\n")
    chat = {"id": "a", "messages": [{"role": "user", "content": "Plural of cat?"}], "answer": "cats"}
    for row in (chat, {"id": "a", "prompt": "Q: cat\nA:", "answer": "cats"}):
        for name in ("train", "eval"):
            (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
        result = opcd("train", ROOT / "deploy/configs/own.yaml", f"student.model={tiny_model}", "--dry-run")
        assert result.exit_code == 0, result.output
        assert "1 train, 1 eval" in result.stdout


def test_the_demos_sets_share_no_word_with_each_other_or_the_context() -> None:
    folder = ROOT / "deploy/configs/demo"
    sets = {
        name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "valid", "eval")
    }
    context = (folder / "context.txt").read_text()
    prompts = [row["prompt"] for rows in sets.values() for row in rows]
    assert len(set(prompts)) == len(prompts) == 296
    assert len({row["answer"] for rows in sets.values() for row in rows}) == 296
    assert context.endswith("\n")
    for prompt in prompts:
        assert prompt not in context
