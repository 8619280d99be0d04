"""The task ``few-shot``: disjoint sets, right answers, and the files that the configurations name."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from common.config.loader import load_config
from common.data.rows import read_rows
from deploy.tasks.few_shot import EXAMPLES, TASKS, number_in_words, past_of, prepare_few_shot
from tests.support.paths import ROOT

CONFIGS = ROOT / "deploy/configs/few_shot"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("models") / "few-shot"
    assert prepare_few_shot(folder)
    assert not prepare_few_shot(folder)
    return folder


@pytest.mark.parametrize("task", TASKS)
def test_no_row_is_in_two_sets_or_in_the_context(task: str, written: Path) -> None:
    rows = {name: read_rows(written / task / f"{name}.jsonl", need_answers=True) for name in ("train", "valid", "eval")}
    assert {name: len(found) for name, found in rows.items()} == {"train": 64, "valid": 24, "eval": 64}
    prompts = [str(row.prompt) for found in rows.values() for row in found]
    assert len(set(prompts)) == len(prompts)
    context = (written / task / "context.txt").read_text()
    assert not any(prompt in context for prompt in prompts)
    for row in rows["eval"]:
        assert row.answer == TASKS[task][str(row.prompt).removeprefix("Q: ").removesuffix("\nA:")]


@pytest.mark.parametrize("task", TASKS)
def test_the_context_is_examples_as_rows_are_asked(task: str, written: Path) -> None:
    context = (written / task / "context.txt").read_text()
    assert context == "".join(f"Q: {one}\nA: {TASKS[task][one]}\n" for one in EXAMPLES[task])
    first = read_rows(written / task / "train.jsonl")[0].prompt
    assert str(first).startswith("Q: ")
    assert str(first).endswith("\nA:")


@pytest.mark.parametrize("task", TASKS)
def test_rows_with_examples_are_the_same_rows_and_each_shows_four_other_training_rows(task: str, written: Path) -> None:
    known = {str(row.prompt): row.answer for row in read_rows(written / task / "train.jsonl")}
    contexts = []
    for name in ("train", "valid", "eval"):
        rows = read_rows(written / task / "with_examples" / f"{name}.jsonl", own_contexts=True)
        assert [row.model_copy(update={"context": None}) for row in rows] == read_rows(written / task / f"{name}.jsonl")
        for row in rows:
            shown = str(row.context).removesuffix("\n").split("\nQ: ")
            pairs = [one.removeprefix("Q: ").partition("\nA: ") for one in shown]
            assert len(pairs) == len({question for question, _, _ in pairs}) == 4
            assert all(known[f"Q: {question}\nA:"] == answer for question, _, answer in pairs)
            assert str(row.prompt) not in str(row.context)
            contexts.append(row.context)
    assert len(set(contexts)) == len(contexts)


@pytest.mark.parametrize("task", TASKS)
def test_another_task_brings_its_own_examples(task: str, written: Path) -> None:
    rows = read_rows(written / task / "other_task.jsonl", need_answers=True)
    (other,) = {next(name for name in TASKS if row.id.startswith(name)) for row in rows}
    assert other != task
    context = (written / other / "context.txt").read_text()
    assert all(str(row.prompt).startswith(context) for row in rows)
    learned = {str(row.prompt) for row in read_rows(written / task / "train.jsonl")}
    assert learned.isdisjoint(str(row.prompt).removeprefix(context) for row in rows)


def test_pasts_and_numbers() -> None:
    pasts = {"stop": "stopped", "bake": "baked", "play": "played", "carry": "carried", "go": "went", "visit": "visited"}
    assert {verb: past_of(verb) for verb in pasts} == pasts
    numbers = {0: "zero", 15: "fifteen", 40: "forty", 73: "seventy-three", 300: "three hundred"}
    numbers |= {507: "five hundred seven", 912: "nine hundred twelve", 640: "six hundred forty"}
    assert {number: number_in_words(number) for number in numbers} == numbers
    assert len({number_in_words(number) for number in range(1000)}) == 1000


def test_every_task_has_a_configuration_that_names_what_is_written(written: Path) -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(TASKS)
    settings = []
    for task in TASKS:
        config = load_config(CONFIGS / f"{task}.yaml")
        (other,) = config.eval.ood.values()
        assert config.context.file is not None
        for path in (config.context.file, config.data.train, config.data.valid, config.data.eval, other):
            assert (written / Path(str(path)).relative_to("models/few-shot")).is_file()
            assert Path(str(path)).parent.name == task
        assert all((ROOT / path).is_file() for path in config.eval.perplexity.values())
        tree = yaml.safe_load((CONFIGS / f"{task}.yaml").read_text())
        settings.append({name: tree[name] for name in ("student", "teacher", "rollout", "loss", "learner", "sync")})
    assert settings[0] == settings[1] == settings[2]  # so that what differs between the rows is the task
