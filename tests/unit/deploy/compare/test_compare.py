"""Comparison of methods: its runs, its behaviour after an interrupt, its table and picture."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from common.config.loader import dump_config
from common.config.model import ConfigError
from common.telemetry.run_files import Progress
from deploy.compare.compare import compare, train_in_process
from deploy.compare.picture import picture
from deploy.compare.plan import PlannedRun, can_resume, is_finished, plan, root_of
from deploy.compare.table import Failed, Outcome, compared, markdown, read_outcome

ALL = ("opcd", "offpolicy", "sequence", "pg", "in_context")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A configuration whose runs are never started."""
    settings = {
        "run": {"name": "small", "dir": str(tmp_path / "runs")},
        "student": {"model": "m"},
        "context": {"text": "c"},
        "data": {"train": "t", "eval": "e"},
        "rollout": {"temperature": 0.7, "max_staleness": 1},
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def write_result(run: PlannedRun, right: str, *, outcome: str = "finished") -> None:
    """Write the result of a run; `right` holds a digit for each of four rows, 1 if the final answer is right."""
    assert run.config is not None
    folder = run.config.run.path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump_config(run.config))
    share = sum(map(int, right)) / 4
    summary: dict[str, Any] = {
        "outcome": outcome,
        "final": {"accuracy": share},
        "gap_closed": share,
        "kl_first": 2.0,
        "kl_last": 0.5,
        "time_s": {"total": 30.0},
        "ood": {"other": {}},
        "perplexity": {"prose": {"change": 0.1 * (run.seed + 1)}},
    }
    rows = {"base": "0000", "in_context": "1111", "final": right, "ood/other/before": "1111", "ood/other/after": "1110"}
    (folder / "summary.json").write_text(json.dumps(summary))
    named = {name: {f"row{i}": float(value) for i, value in enumerate(text)} for name, text in rows.items()}
    (folder / "accuracy.json").write_text(json.dumps(named))


# --- the plan -------------------------------------------------------------------------------------------------------


def test_every_method_with_every_seed_and_the_rest_of_the_configuration_as_it_was(path: Path) -> None:
    runs = plan(path, ["learner.steps=7"], ALL, [0, 3])
    assert [run.name for run in runs] == [f"{m}-{s}" for s in (0, 3) for m in ("opcd", "offpolicy", "sequence", "pg")]
    for run in runs:
        assert run.config is not None, run.fault
        assert run.config.run.seed == run.seed
        assert run.config.learner.steps == 7
        assert run.config.run.path == root_of(plan(path, [], ALL, [0])[0].config or run.config).parent / run.name
    assert len({run.config.run.path for run in runs if run.config}) == len(runs)
    opcd, offpolicy, sequence, pg = (run.config for run in runs[:4] if run.config)
    assert (opcd.rollout.source, opcd.loss.direction, opcd.rollout.max_staleness) == ("student", "reverse", 1)
    assert (offpolicy.rollout.source, offpolicy.loss.direction, offpolicy.loss.support) == (
        "teacher",
        "forward",
        "teacher",
    )
    assert (sequence.rollout.source, sequence.loss.form) == ("teacher", "nll")
    assert sequence.answers_path == offpolicy.answers_path
    assert (pg.loss.form, pg.loss.temperature, pg.rollout.source) == ("policy_gradient", 0.7, "student")


def test_recipes_of_the_configuration_are_the_on_policy_methods_alone(path: Path) -> None:
    recipes = ["rollout.samples_per_prompt=2", "rollout.temperature=1.0", "rollout.max_staleness=0"]
    recipes += ["loss.reward_weight=0.1", "loss.reward=exact", "loss.clip_per_entry=0.5"]
    runs = {run.method: run for run in plan(path, recipes, ALL, [0])}
    assert [run.fault for run in runs.values()] == [None] * 4
    losses = {method: run.config.loss for method, run in runs.items() if run.config}
    assert (losses["opcd"].reward_weight, losses["opcd"].clip_per_entry) == (0.1, 0.5)
    assert {losses[name].reward_weight for name in ("offpolicy", "sequence", "pg")} == {0.0}
    assert losses["offpolicy"].clip_per_entry == 0.5
    mix = ["rollout.mix={teacher: 0.25}", "rollout.topk_from=learner", "rollout.max_staleness=0"]
    mixed = {run.method: run.config for run in plan(path, mix, ALL, [0])}
    assert [config is not None and config.rollout.mix is not None for config in mixed.values()] == [True, *[False] * 3]
    assert all(mixed.values())


def test_seeds_do_not_share_answers(path: Path) -> None:
    runs = plan(path, [], ["sequence"], [0, 1])
    assert len({run.config.answers_path for run in runs if run.config}) == 2


def test_a_method_that_the_configuration_does_not_allow_is_a_row_of_its_own(path: Path) -> None:
    runs = {run.method: run for run in plan(path, ["teacher.url=http://127.0.0.1:1"], ALL, [0])}
    assert runs["opcd"].config is not None
    assert runs["offpolicy"].config is None
    assert "set teacher.model to the model that answers" in (runs["offpolicy"].fault or "")


@pytest.mark.parametrize(
    ("methods", "seeds", "overrides", "named"),
    [
        (["ocpd"], [0], [], "unknown method 'ocpd': valid are opcd, offpolicy"),
        (["opcd", "opcd"], [0], [], "--methods: name at least one, each once"),
        (["opcd"], [1, 1], [], "--seeds: name at least one, each once; got 1, 1"),
        (["opcd"], [], [], "--seeds: name at least one, each once; got none"),
        (["in_context"], [0], [], "opcd evaluate"),
        (["opcd"], [0], ["data.eval=null"], r"data\.eval is not set"),
        (["opcd"], [0], ["learner.lr=-1"], r"learner\.lr"),
    ],
)
def test_an_invalid_comparison_is_refused(
    path: Path, methods: list[str], seeds: list[int], overrides: list[str], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        plan(path, overrides, methods, seeds)


def test_only_a_run_with_exactly_this_configuration_is_finished(path: Path) -> None:
    (run,) = plan(path, [], ["opcd"], [0])
    assert not is_finished(run)
    write_result(run, "1100", outcome="interrupted")
    assert not is_finished(run)
    write_result(run, "1100")
    assert is_finished(run)
    assert not is_finished(plan(path, ["learner.lr=1e-3"], ["opcd"], [0])[0])


def test_an_interrupted_run_resumes_only_from_a_checkpoint_of_its_configuration(path: Path) -> None:
    (run,) = plan(path, [], ["opcd"], [0])
    write_result(run, "1100", outcome="interrupted")
    assert not can_resume(run)
    assert run.config is not None
    manifest = run.config.run.path / "checkpoints/step-000002/manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("{}")
    assert can_resume(run)
    assert not can_resume(plan(path, ["learner.lr=1e-3"], ["opcd"], [0])[0])


def test_every_method_under_every_setting_is_an_arm(path: Path) -> None:
    varied = ["loss.top_k=1, 16", "learner.lr=1e-3,1e-4"]
    runs = plan(path, [], ["opcd", "sequence"], [0, 1], varied)
    assert len(runs) == 16
    assert runs[0].name == "opcd-top_k_1-lr_1e_3-0"
    assert runs[0].arm == "opcd loss.top_k=1 learner.lr=1e-3"
    assert {(run.config.loss.top_k, run.config.learner.lr) for run in runs if run.config} == {
        (k, lr) for k in (1, 16) for lr in (1e-3, 1e-4)
    }
    assert len({run.config.run.path for run in runs if run.config}) == 16
    # The teacher's answers may depend on the varied key.
    assert len({run.config.answers_path for run in runs if run.config and run.method == "sequence"}) == 8


def test_a_method_sees_the_varied_setting(path: Path) -> None:
    kinds = {run.settings: run for run in plan(path, [], ["offpolicy"], [0], ["teacher.kind=frozen,base"])}
    supports = {s: run.config.loss.support if run.config else run.fault for s, run in kinds.items()}
    assert supports[("teacher.kind=frozen",)] == "teacher"
    assert supports[("teacher.kind=base",)] != "teacher"


@pytest.mark.parametrize(
    ("method", "varied", "runs"),
    [
        ("opcd", "loss.form=tail,raw", True),
        ("pg", "loss.form=tail,raw", False),
        ("offpolicy", "loss.direction=reverse,forward", False),
        ("opcd", "run.seed=4,5", False),
    ],
)
def test_a_row_never_names_a_value_that_the_method_replaces(
    path: Path, method: str, varied: str, *, runs: bool
) -> None:
    found = plan(path, [], [method], [0], [varied])
    assert [run.config is not None for run in found] == [runs, runs]
    assert runs or all(f"{method} sets {varied.partition('=')[0]} itself" in (run.fault or "") for run in found)


@pytest.mark.parametrize(
    ("varied", "named"),
    [
        (["loss.top_k"], "KEY=VALUE,VALUE"),
        (["loss.top_k=1,"], "KEY=VALUE,VALUE"),
        (["loss.top_k=1,1"], "of the same name"),
        (["student.model=a/b,a_b"], "of the same name"),
    ],
)
def test_settings_with_equal_names_are_refused(path: Path, varied: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        plan(path, [], ["opcd"], [0], varied)


# --- the loop -------------------------------------------------------------------------------------------------------


def run_all(runs: list[PlannedRun], root: Path, train: Callable[[PlannedRun, Path, Any], None]) -> dict[str, Any]:
    table = compare(runs, ALL, root, "opcd compare run.yaml", Progress(quiet=True), train)
    assert table.is_file()
    return json.loads((root / "compare.json").read_text())


def test_finished_runs_are_skipped_and_failed_ones_repeated(path: Path, tmp_path: Path) -> None:
    runs, started = plan(path, [], ["opcd", "pg"], [0, 1]), list[str]()

    def train(run: PlannedRun, log: Path, on_line: Any) -> None:
        started.append(run.name)
        log.write_text("step 1/2\nopcd: out of memory\nbye\n")
        if run.method == "opcd":
            write_result(run, "1110")

    result = run_all(runs, tmp_path / "root", train)
    assert started == ["opcd-0", "pg-0", "opcd-1", "pg-1"]
    assert result["arms"]["opcd"]["runs"] == 2
    assert result["arms"]["pg"]["runs"] == 0
    assert "out of memory" in result["arms"]["pg"]["faults"][0]
    started.clear()
    run_all(runs, tmp_path / "root", train)
    assert started == ["pg-0", "pg-1"]


def test_a_runs_steps_are_shown_once_a_minute(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])

    def train(run: PlannedRun, log: Path, on_line: Any) -> None:
        on_line("starting 1 teacher")
        for step in range(1, 10):
            clock[0] += 25
            on_line(f"step {step}/9  kl 1.0")
        log.write_text("opcd: bye\n")

    compare(plan(path, [], ["opcd"], [0]), ["opcd"], tmp_path / "root", "opcd compare", Progress(), train)
    shown = [line for line in capsys.readouterr().out.splitlines() if ": step" in line]
    assert shown == [f"[1/1] opcd-0: step {step}/9  kl 1.0" for step in (3, 6, 9)]


def test_the_result_of_another_configuration_does_not_count(path: Path, tmp_path: Path) -> None:
    (old,) = plan(path, ["learner.lr=1e-3"], ["opcd"], [0])
    write_result(old, "1111")
    (run,) = plan(path, [], ["opcd"], [0])
    result = run_all([run], tmp_path / "root", lambda run, log, on_line: log.write_text("opcd: no GPU\n") and None)
    found = result["arms"]["opcd"]
    assert (found["runs"], found["planned"], found["faults"]) == (0, 1, [f"seed 0: no GPU ({_log(tmp_path)})"])


def _log(folder: Path) -> Path:
    return folder / "root/logs/opcd-0.log"


def test_the_table_is_written_after_every_run(path: Path, tmp_path: Path) -> None:
    runs = plan(path, [], ["opcd", "pg"], [0])

    def train(run: PlannedRun, log: Path, on_line: Any) -> None:
        if run.method == "pg":
            raise KeyboardInterrupt
        write_result(run, "1110")

    with pytest.raises(KeyboardInterrupt):
        run_all(runs, tmp_path / "root", train)
    result = json.loads((tmp_path / "root/compare.json").read_text())
    assert result["arms"]["opcd"]["accuracy"] == 0.75
    assert result["arms"]["pg"]["faults"] == ["seed 0: not run yet"]


def test_a_run_is_a_process_whose_lines_are_shown_and_logged(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run,) = plan(path, [], ["opcd"], [0])
    commands: list[list[str]] = []
    popen = subprocess.Popen

    def fake(command: list[str], **kwargs: Any) -> Any:
        commands.append(command)
        return popen(
            [sys.executable, "-c", "import sys; print('step 1/2'); print('opcd: x', file=sys.stderr)"], **kwargs
        )

    monkeypatch.setattr(subprocess, "Popen", fake)
    shown: list[str] = []
    train_in_process(run, tmp_path / "opcd-0.log", shown.append)
    assert sorted(shown) == ["opcd: x", "step 1/2"]
    assert sorted((tmp_path / "opcd-0.log").read_text().splitlines()) == sorted(shown)
    assert commands == [[sys.executable, "-m", "learner.train", str(tmp_path / "opcd-0.yaml")]]
    assert run.config is not None
    assert (tmp_path / "opcd-0.yaml").read_text() == dump_config(run.config)


# --- the table ------------------------------------------------------------------------------------------------------


@pytest.fixture
def outcomes(path: Path) -> list[Outcome]:
    """Two seeds: on-policy better than off-policy on both, sequence-level failed once, policy gradient not allowed."""
    runs = plan(path, [], ALL, [0, 1])
    right = {"opcd": ("1110", "1111"), "offpolicy": ("1100", "1110"), "sequence": ("1000", "")}
    found: list[Outcome] = []
    for run in runs:
        text = right.get(run.method, ("", ""))[run.seed]
        if text:
            write_result(run, text)
        found.append(read_outcome(run) if text else Failed(run, "failed: RunError: no"))
    return found


def test_means_are_over_seeds_and_rows(outcomes: list[Outcome]) -> None:
    result = compared(outcomes, ALL)
    methods = result["arms"]
    assert methods["opcd"]["accuracy"] == pytest.approx(7 / 8)
    assert methods["opcd"]["ci95"][0] < 7 / 8 < methods["opcd"]["ci95"][1]
    assert methods["opcd"]["gap_closed"] == pytest.approx(7 / 8)
    assert methods["offpolicy"]["against_reference"]["change"] == pytest.approx(-0.25)
    against = methods["sequence"]["against_reference"]
    assert (against["change"], against["seeds"]) == (pytest.approx(-0.5), 1)  # of the one seed that both have
    assert methods["opcd"]["against_reference"] is None
    assert methods["opcd"]["ood"]["other"]["change"] == pytest.approx(-0.25)
    prose = methods["opcd"]["perplexity"]["prose"]
    assert (prose["change"], prose["each"]) == (pytest.approx(0.15), pytest.approx([0.1, 0.2]))
    assert (methods["sequence"]["runs"], methods["sequence"]["planned"]) == (1, 2)
    assert (methods["pg"]["runs"], len(methods["pg"]["faults"])) == (0, 2)
    base, in_context = result["before"]
    assert (base["set"], base["accuracy"], base["seeds"]) == ("base", 0.0, 2)
    assert (in_context["set"], in_context["accuracy"]) == ("in_context", 1.0)
    assert [one["set"] for one in compared(outcomes, ["opcd"])["before"]] == ["base"]


def test_several_answers_a_row_give_pass_at_k(path: Path) -> None:
    runs = plan(path, [], ["opcd", "offpolicy"], [0])
    for run, shares in zip(runs, ((0.25, 0.5, 1.0, 0.0), (0.5, 0.5, 0.5, 0.5)), strict=True):
        write_result(run, "1100")
        assert run.config is not None
        folder = run.config.run.path
        summary = json.loads((folder / "summary.json").read_text())
        summary["final"]["samples"] = 4
        (folder / "summary.json").write_text(json.dumps(summary))
        rows = json.loads((folder / "accuracy.json").read_text())
        rows["final"] = {f"row{i}": share for i, share in enumerate(shares)}
        (folder / "accuracy.json").write_text(json.dumps(rows))
    result = compared([read_outcome(run) for run in runs], ["opcd", "offpolicy"])
    assert result["arms"]["opcd"]["pass_at"]["2"]["value"] == pytest.approx((1 / 2 + 5 / 6 + 1 + 0) / 4)
    assert result["arms"]["opcd"]["pass_at"]["4"]["value"] == pytest.approx(3 / 4)
    assert result["arms"]["offpolicy"]["pass_at"]["4"]["value"] == 1.0  # flatter at one answer, higher at four
    page = markdown(json.loads(json.dumps(result)), "opcd compare run.yaml")
    table = [line for line in page.splitlines() if line.startswith("| ")]
    assert "| accuracy | pass@2 | pass@4 | gap closed |" in table[0]
    assert len({line.count("|") for line in table[:4]}) == 1


def test_the_table_has_a_line_for_every_method_and_names_failures(outcomes: list[Outcome]) -> None:
    page = markdown(json.loads(json.dumps(compared(outcomes, ALL))), "opcd compare run.yaml")
    lines = page.splitlines()
    table = [line for line in lines if line.startswith("| ")]
    assert len({line.count("|") for line in table[:8]}) == 1
    (opcd,) = [line for line in table if line.startswith("| on-policy")]
    assert "2/2 | 0.875 [" in opcd
    assert "-0.250 [" in opcd  # on the other task
    assert "+0.150" in opcd
    (failed,) = [line for line in table if "policy gradient" in line]
    assert "| 0/2 | failed |" in failed
    assert "- sampled-token policy gradient, seed 1: failed: RunError: no" in lines
    assert sum(line.startswith(("| opcd |", "| offpolicy |", "| sequence |")) for line in table) == 5
    assert "`opcd compare run.yaml`" in lines


def test_the_picture_shows_the_rows_of_the_table(outcomes: list[Outcome]) -> None:
    result = compared(outcomes, ALL)
    text = picture(result)
    assert text is not None
    svg = ElementTree.fromstring(text)  # well-formed, including the style
    space = {"": "http://www.w3.org/2000/svg"}
    rows = svg.findall("g", space)
    titles = [row.findtext("text", namespaces=space) for row in rows]
    finished = [one["title"] for one in result["arms"].values() if one["runs"]]
    assert titles == [*(one["title"] for one in result["before"]), *finished]
    ticks = {text.text: float(text.get("x", "")) for text in svg.findall("text", space)}
    opcd = rows[len(result["before"])]
    dot, whisker = opcd.find("circle", space), opcd.find("line", space)
    assert dot is not None
    assert whisker is not None

    def position(share: float) -> float:
        return ticks["0 %"] + share * (ticks["100 %"] - ticks["0 %"])

    assert float(dot.get("cx", "")) == pytest.approx(position(7 / 8), abs=0.01)
    assert float(whisker.get("x1", "")) == pytest.approx(position(result["arms"]["opcd"]["ci95"][0]), abs=0.01)


def test_a_result_without_accuracies_has_no_picture(path: Path) -> None:
    assert picture(compared([Failed(run, "no") for run in plan(path, [], ["opcd"], [0])], ["opcd"])) is None


def test_settings_are_rows_compared_with_the_first(path: Path) -> None:
    runs = plan(path, [], ["opcd"], [0, 1], ["loss.top_k=1,16"])
    for run, right in zip(runs, ("1000", "1110", "1100", "1111"), strict=True):
        write_result(run, right)
    result = compared([read_outcome(run) for run in runs], ALL)
    first, second = result["arms"].values()
    assert result["reference"] == "opcd loss.top_k=1"
    assert (first["accuracy"], second["accuracy"]) == (pytest.approx(3 / 8), pytest.approx(7 / 8))
    assert first["against_reference"] is None
    assert second["against_reference"]["change"] == pytest.approx(0.5)
    assert [one["title"] for one in result["before"]] == ["without context, before", "in context, not trained"]
    page = markdown(json.loads(json.dumps(result)), "x")
    assert "| against opcd loss.top_k=1 |" in page
    assert "| on-policy context distillation, loss.top_k=16 | 2/2 | 0.875 [" in page


def test_settings_that_change_the_accuracy_before_training_have_separate_rows(path: Path) -> None:
    runs = plan(path, [], ["opcd"], [0], ["context.text=c,d"])
    for run in runs:
        write_result(run, "1000")
    assert runs[1].config is not None
    rows = runs[1].config.run.path / "accuracy.json"
    rows.write_text(rows.read_text().replace('"in_context": {"row0": 1.0', '"in_context": {"row0": 0.0'))
    before = compared([read_outcome(run) for run in runs], ALL)["before"]
    assert {one["title"]: one["accuracy"] for one in before if one["set"] == "in_context"} == {
        "in context, not trained, context.text=c": 1.0,
        "in context, not trained, context.text=d": 0.75,
    }


def test_a_result_of_only_failures_is_a_table(path: Path) -> None:
    result = compared([Failed(run, "no") for run in plan(path, [], ALL, [0])], ALL)
    assert result["before"] == []
    assert markdown(result, "x").count("| failed |") == 4


@pytest.mark.parametrize("name", ["summary.json", "accuracy.json"])
def test_a_run_without_a_complete_result_has_failed(path: Path, name: str) -> None:
    (run,) = plan(path, [], ["opcd"], [0])
    write_result(run, "1111")
    assert run.config is not None
    (run.config.run.path / name).unlink()
    found = read_outcome(run)
    assert isinstance(found, Failed)
    assert name in found.reason


def test_the_command_refuses_invalid_seeds(path: Path) -> None:
    from typer.testing import CliRunner

    from deploy.cli.main import app

    result = CliRunner().invoke(app, ["compare", str(path), "--seeds", "0,x"])
    assert result.exit_code == 2
    assert "--seeds '0,x': expected whole numbers separated by commas" in result.stderr


def test_the_command_passes_methods_seeds_and_settings(path: Path) -> None:
    """Every run of the comparison is finished, so none is started."""
    from typer.testing import CliRunner

    from deploy.cli.main import app

    for run in plan(path, [], ["opcd", "pg"], [4], ["loss.top_k=1,16"]):
        write_result(run, "1110")
    options = ["--methods", "opcd,pg", "--seeds", "4", "--vary", "loss.top_k=1,16"]
    result = CliRunner().invoke(app, ["compare", str(path), *options])
    assert result.exit_code == 0, result.output
    for setting in ("loss.top_k=1 ", "loss.top_k=16 "):
        assert setting in result.output
