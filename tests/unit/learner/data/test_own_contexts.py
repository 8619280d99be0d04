"""A run over rows with their own contexts: which rows are rendered when, what is checked, what the dry run says."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.config.loader import load_config
from common.config.model import Config, ConfigError
from common.data.model_lookup import load_tokenizer
from common.data.rendering import Renderer, teacher_sequence
from common.data.rows import DataError, Row
from learner.data import inputs as inputs_module
from learner.data import prompts, stored_rows
from learner.data.inputs import read_inputs, read_sources
from learner.data.prompts import LazyPrompts, rows_to_check
from learner.data.samples import SampleSource
from learner.data.stored_rows import StoredRows
from learner.data.teacher_answers import answers_origin
from learner.loop.checkpoints import identity_of
from learner.preflight.checks import preflight


def rows_of(name: str, count: int = 6, **columns: Any) -> list[dict[str, Any]]:
    return [
        {
            "id": f"{name}{i}",
            "prompt": [{"role": "user", "content": f"What is {i}?"}],
            "privileged_context": f"{name} {i}",
            "answer": "x",
            **columns,
        }
        for i in range(count)
    ]


@pytest.fixture
def make(tmp_path: Path, tiny_model: Path) -> Any:
    """Write the sets given as lists of lines, and load a configuration with the sections given."""

    def write(sets: dict[str, list[dict[str, Any]]] | None = None, **sections: dict[str, Any]) -> Config:
        written = {name: rows_of(name) for name in ("train", "valid", "eval")} | (sets or {})
        for name, rows in written.items():
            (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        settings: dict[str, dict[str, Any]] = {
            "run": {"name": "small", "dir": str(tmp_path / "runs")},
            "student": {"model": str(tiny_model)},
            "context": {"from_rows": True},
            "data": {
                "columns": {"messages": "prompt", "context": "privileged_context"},
                **{name: str(tmp_path / f"{name}.jsonl") for name in written},
            },
            "rollout": {"batch_size": 4, "samples_per_prompt": 2, "max_tokens": 8},
        }
        for section, values in sections.items():
            settings[section] = {**settings.get(section, {}), **values}
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(settings))
        return load_config(path)

    return write


def test_every_sample_has_the_context_of_its_row(make: Any) -> None:
    config = make()
    inputs = read_inputs(config)
    source, tokenizer = SampleSource(config, inputs.train), load_tokenizer(config.student.model)
    for sample in (source[number] for number in range(24)):
        number = sample.prompt.row_id.removeprefix("train")
        shown = tokenizer.decode(teacher_sequence(sample.prompt, inputs.contexts))
        assert f"train {number}<" in shown
        assert f"What is {number}?" in shown
    assert inputs.contexts == {}


def test_few_prompts_stay_in_memory_whatever_the_number_of_rows(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "KEPT_PROMPTS", 4)
    inputs = read_inputs(make({"train": rows_of("train", 20)}))
    assert isinstance(inputs.train, LazyPrompts)
    assert [prompt.row_id for prompt in inputs.train] == [f"train{i}" for i in range(20)]
    assert len(inputs.train._kept) == 4
    assert [one.row_id for one in inputs.train[-2:]] == ["train18", "train19"]
    with pytest.raises(IndexError):
        inputs.train[20]


def test_the_longest_rows_are_checked_and_some_of_all_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "CHECKED_ROWS", 6)
    rows = [Row(id=str(i), prompt="p", context="c" * (100 if i in (11, 17, 19) else 1)) for i in range(30)]
    stored = StoredRows(rows)
    assert rows_to_check(stored, every_row=False) == [0, 10, 11, 17, 19, 20]
    assert rows_to_check(stored, every_row=True) == list(range(30))
    assert rows_to_check(StoredRows(rows[:6]), every_row=False) == list(range(6))


def test_a_row_that_cannot_be_rendered_is_named_by_the_dry_run_or_when_its_turn_comes(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "CHECKED_ROWS", 4)
    rows = rows_of("train", 20)
    rows[13]["prompt"].insert(0, {"role": "system", "content": "s"})
    for number in (4, 5):  # longer than the faulty one
        rows[number]["privileged_context"] += "x" * 20
    config = make({"train": rows}, student={"system": "none"})
    (error,) = preflight(config, offline=True).texts("error")
    assert "row 'train13' has a system message" in error
    report = preflight(config, offline=True, every_row=False)
    assert report.texts("error") == []
    assert report.inputs is not None
    assert len(report.inputs.facts["data.train"]) == 4
    assert report.inputs.train[12].row_id == "train12"
    with pytest.raises(DataError, match="row 'train13' has a system message"):
        report.inputs.train[13]


def test_a_start_renders_a_bounded_number_of_rows_whatever_their_number(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def noting(name: str) -> Any:
        method = getattr(Renderer, name)

        def noted(self: Renderer, row: Row) -> Any:
            seen.append(f"{name} {row.id}")
            return method(self, row)

        return noted

    for name in ("render", "_parent_key"):
        monkeypatch.setattr(Renderer, name, noting(name))
    monkeypatch.setattr(prompts, "CHECKED_ROWS", 8)
    monkeypatch.setattr(inputs_module, "PARENT_ROWS", 8)
    for rows in (60, 600):
        seen.clear()
        inputs = preflight(make({"train": rows_of("train", rows)}), offline=True, every_row=False).inputs
        assert inputs is not None
        assert len(inputs.train) == rows
        assert len([one for one in seen if one.startswith("render train")]) <= 8
        assert len([one for one in seen if one.startswith("_parent_key train")]) <= 16
        assert inputs.train[rows - 1].row_id == f"train{rows - 1}"


def test_the_texts_of_many_rows_stay_on_disk(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_rows, "IN_MEMORY_BYTES", 1000)
    config, written = make({"train": rows_of("train", 50)}), rows_of("train", 50)
    rows = read_sources(config).train
    assert rows._file._rolled  # type: ignore[attr-defined]
    config.data.train.write_text("")  # a source that changes later does not change the rows
    assert [row.context for row in rows] == [row["privileged_context"] for row in written]
    assert (rows[-1].id, rows[7].id, [row.id for row in rows[48:]]) == ("train49", "train7", ["train48", "train49"])
    with pytest.raises(IndexError):
        rows[50]


def test_a_full_disk_is_an_error_with_the_remedy(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make()

    def full(self: Any, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stored_rows.tempfile.SpooledTemporaryFile, "write", full)
    with pytest.raises(DataError, match=r"data\.train: cannot keep .* No space left .* TMPDIR"):
        read_sources(config)


def test_an_unchecked_row_that_is_too_long_is_refused_by_name_when_its_turn_comes(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "CHECKED_ROWS", 2)
    rows = rows_of("train", 20)
    rows[0]["privileged_context"] = "a" * 200  # one long run is few tokens
    rows[13]["privileged_context"] = " ".join(["1", "2", "3", "4", "5", "6", "7", "8", "9", "0"] * 4)
    config = make({"train": rows})
    inputs = preflight(config, offline=True, every_row=False).inputs
    assert inputs is not None
    assert isinstance(inputs.train, LazyPrompts)
    length = len(inputs.train[13].student_ids)
    inputs.train._kept.clear()
    inputs.train.limits["teacher"] = ("the teacher's limit", length + 8 + 20)
    assert inputs.train[12].row_id == "train12"
    with pytest.raises(DataError, match=r"data\.train: row 'train13': \d+ teacher tokens .* \(the teacher's limit\)"):
        inputs.train[13]
    inputs.train.limits["student"] = ("student.max_sequence_tokens", length)
    with pytest.raises(DataError, match=r"row 'train11': .* student tokens .* \(student.max_sequence_tokens\)"):
        inputs.train[11]


def test_training_rows_need_contexts_and_held_out_rows_decide_what_is_measured(make: Any) -> None:
    bare = rows_of("eval")
    del bare[3]["privileged_context"]
    bare[3] |= {"privileged_context": None}
    inputs = read_inputs(make({"eval": bare}))
    assert not inputs.has_context_for_eval
    (warning,) = preflight(make({"eval": bare}), offline=True).texts("warning")
    assert "data.eval has rows without a context" in warning
    assert read_inputs(make({"eval": bare}, context={"text": "Rules."})).has_context_for_eval
    with pytest.raises(DataError, match=r"1 of 6 rows \(the first is 'eval3'\) have neither"):
        read_sources(make({"train": bare}))
    assert read_sources(make({"train": bare}, context={"text": "Rules."})).context == "Rules."


def test_a_column_that_looks_like_a_context_is_a_warning_and_other_unused_ones_are_listed_once(make: Any) -> None:
    sets = {name: rows_of(name, source="book", prompt_id="7") for name in ("train", "valid", "eval")}
    config = make(
        sets, context={"from_rows": False, "text": "Rules."}, data={"columns": {"messages": "prompt"}, "valid": None}
    )
    report = preflight(config, offline=True)
    assert report.texts("error") == []
    assert [text.partition(" looks")[0] for text in report.texts("warning")] == [
        "data.train: column 'privileged_context'",
        "data.eval: column 'privileged_context'",
    ]
    listed = [text for name, text in report.summary_lines() if name == "not used"]
    assert listed == ["columns privileged_context, source, prompt_id"]
    ignored = config.model_copy(update={"data": config.data.model_copy(update={"ignore": ("privileged_context",)})})
    assert preflight(ignored, offline=True).texts("warning") == []


@pytest.mark.parametrize(
    ("sections", "part"),
    [
        ({"context": {"from_rows": False, "text": "c"}}, "data.columns.context gives each row its own context"),
        ({"context": {"pool": "p.jsonl"}}, "context.from_rows takes at most one"),
        ({"context": {"text": "a", "file": "b"}}, "context.from_rows takes at most one"),
        (
            {"data": {"columns": {"messages": "prompt", "teacher_messages": "t"}, "teacher_template": "{prompt}"}},
            "data.teacher_template makes the teacher's messages",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(make: Any, sections: Any, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        make(**sections)


def test_a_change_of_a_rows_context_or_of_the_template_makes_another_run(make: Any) -> None:
    def identity(config: Config) -> Any:
        inputs = read_inputs(config)
        return identity_of(
            config, tokenizer="t", teachers={}, contexts=inputs.context_names, data=inputs.data_digest
        ), answers_origin(config, contexts=inputs.context_names, data=inputs.data_digest)

    first = identity(make())
    assert identity(make()) == first
    changed = rows_of("train")
    changed[2]["privileged_context"] = "other"
    template = "{prompt} {privileged_context}"
    columns = {"messages": "prompt"}
    for arguments in (
        {"sets": {"train": changed}},
        {"context": {"text": "Rules."}},
        {"context": {"placement": "user_prefix"}},
        {"context": {"chat_template_kwargs": {"a": 1}}},
        {"data": {"columns": columns, "teacher_template": template}},
    ):
        found = identity(make(**arguments))
        assert found[0] != first[0]
        assert found[1] != first[1]


def test_a_function_gets_every_column_and_a_change_of_any_makes_another_run(make: Any) -> None:
    context = {"from_rows": False, "from_rollout": "tests.support.answer_hooks:by_row"}
    digests = set()
    for hint in ("one", "two"):
        config = make({"train": rows_of("train", hint=hint)}, context=context, data={"columns": {"messages": "prompt"}})
        inputs = read_inputs(config)
        digests.add(inputs.data_digest)
        columns = inputs.train[1].row
        assert columns is not None
        assert (columns["id"], columns["hint"], columns["privileged_context"]) == ("train1", hint, "train 1")
    assert len(digests) == 2
    other = config.context.model_copy(update={"from_rollout": "tests.support.answer_hooks:slow"})
    assert read_inputs(config.model_copy(update={"context": other})).context_names != inputs.context_names


def test_a_games_own_context_goes_to_the_player_of_its_turns(make: Any) -> None:
    game = {"environment": "FrozenLake", "options": {"size": 3}, "context": "G is the goal."}
    games = [{**game, "id": f"g{i}", "seed": i} for i in range(2)]
    inputs = read_inputs(make(dict.fromkeys(("train", "valid", "eval"), games), data={"columns": {}}))
    assert inputs.train[0].game is not None
    assert inputs.train[0].game.context == "G is the goal."
    assert inputs.train[0].own_context is not None
