"""Runs of a comparison: methods, seeds, settings, and which of them are finished."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.config.model import ConfigError
from deploy.compare.plan import can_resume, is_finished, plan, root_of
from tests.support.comparisons import ALL, write_result


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
