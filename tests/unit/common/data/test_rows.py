"""Rows: validation with file and line, and the order of training."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from common.config.model import DataConfig
from common.data.rows import DataError, batch_rows, read_rows

U = [{"role": "user", "content": "u"}]


def write(folder: Path, *lines: Any) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_raw_and_chat_rows_are_read_and_extra_columns_ignored(tmp_path: Path) -> None:
    rows = read_rows(
        write(
            tmp_path,
            {"id": "a", "prompt": "p", "answer": "x", "source": "book"},
            "",
            {"id": 7, "messages": [{"role": "user", "content": "u"}]},
        )
    )
    assert [row.id for row in rows] == ["a", "7"]
    assert rows[0].answer == "x"


def test_every_bad_row_is_reported_with_file_and_line(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"id": "a", "prompt": "p"},
        {"id": "a", "prompt": "p"},
        {"id": "b", "promt": "p"},
        {"id": "c"},
        "{nope",
        {"id": "d", "messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "x"}]},
        {"id": "e", "messages": [{"role": "robot", "content": "u"}]},
        {"id": "f", "prompt": ""},
    )
    with pytest.raises(DataError) as error:
        read_rows(path)
    lines = str(error.value).splitlines()
    assert [line.split(":")[1] for line in lines] == ["2", "3", "4", "5", "6", "7", "8"]
    assert all(line.startswith(f"{path}:") for line in lines)
    assert "did you mean 'prompt'" in lines[1]


def test_a_long_list_of_faults_is_cut_and_counted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="and 5 more"):
        read_rows(write(tmp_path, *["x"] * 25))


def test_answers_are_required_on_demand(tmp_path: Path) -> None:
    path = write(tmp_path, {"id": "a", "prompt": "p"})
    assert read_rows(path)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: row 'a' has no `answer`"):
        read_rows(path, need_answers=True)


def test_a_callers_check_adds_faults(tmp_path: Path) -> None:
    path = write(tmp_path, {"id": "a", "prompt": "p"}, {"id": "b", "prompt": "p"})
    with pytest.raises(DataError) as error:
        read_rows(path, check=lambda row: "no b" if row.id == "b" else None)
    assert str(error.value) == f"{path}:2: no b"


def test_missing_and_empty_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="holds no row"):
        read_rows(write(tmp_path, ""))


def test_every_epoch_uses_every_row_once_in_a_new_order() -> None:
    taken = [row for step in range(14) for row in batch_rows(step, batch_size=5, rows=7, seed=3)]
    epochs = [taken[i : i + 7] for i in range(0, 70, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert batch_rows(3, batch_size=5, rows=7, seed=4) != batch_rows(3, batch_size=5, rows=7, seed=3)


def test_options_and_seed_count_for_games_only(tmp_path: Path) -> None:
    game = {"id": "g", "environment": "FrozenLake", "options": {"size": 4}, "seed": 7}
    quiz = {"id": "q", "prompt": "p", "options": ["a", "b"], "seed": "x", "answer": "a"}
    first, second = read_rows(write(tmp_path, game, quiz), need_answers=True)
    assert (first.environment, first.options, first.seed) == ("FrozenLake", {"size": 4}, 7)
    assert second.options == {}
    with pytest.raises(DataError, match="exactly one of"):
        read_rows(write(tmp_path, {**game, "prompt": "p"}))


def columns_of(**keys: Any) -> DataConfig:
    return DataConfig.model_validate({"train": "unused", **keys})


@pytest.mark.parametrize(
    ("given", "answer"),
    [("42.0", "42"), ("42", "42"), ("0.5", "0.5"), ('"42.0"', "42.0"), ("NaN", None), ("null", None)],
)
def test_a_number_is_its_text_and_nan_is_missing(given: str, answer: str | None, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"id": "a", "prompt": "p", "answer": {given}}}')
    (row,) = read_rows(path, columns_of())
    assert row.answer == answer
    if answer is None:
        with pytest.raises(DataError, match="has no `answer`"):
            read_rows(path, columns_of(), need_answers=True)


def test_whole_floats_are_labels_and_an_infinite_answer_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, '{"id": "a", "prompt": "p", "answer": 1.0}')
    assert read_rows(path, columns_of(labels=["no", "yes"]))[0].answer == "yes"
    with pytest.raises(DataError, match="answer inf is not a number"):
        read_rows(write(tmp_path, '{"id": "a", "prompt": "p", "answer": Infinity}'), columns_of())


def test_a_null_is_absent_wherever_a_table_has_one(tmp_path: Path) -> None:
    """Arrow gives every message, and every game's options, each field that any row has."""
    message = {"role": "user", "content": "u", "name": None, "tool_calls": None}
    chat = {"id": "a", "messages": [message], "prompt": None, "environment": None, "options": None, "teacher": None}
    game = {"id": "b", "environment": "FrozenLake", "options": {"size": 3, "depth": None}, "messages": None}
    first, second = read_rows(write(tmp_path, chat, game), columns_of())
    assert first.messages is not None
    assert first.messages[0].content == "u"
    assert second.options == {"size": 3}
    with pytest.raises(DataError, match=r"messages\.0: `name` and `tool_call_id` belong to role `tool`"):
        read_rows(write(tmp_path, {"id": "a", "messages": [{**message, "name": "Ann"}]}), columns_of())


def test_rows_without_an_id_are_numbered_in_every_kind_of_file(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path, {"prompt": "p"}, {"id": None, "prompt": "q"}, {"id": 7.0, "prompt": "r"}))
    assert [row.id for row in rows] == ["0", "1", "7"]


def test_a_name_close_to_a_column_that_is_there_is_another_column(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "u"}]
    rows = read_rows(
        write(
            tmp_path,
            {"id": "a", "messages": chat, "prompt_id": "x", "teacher": "t", "teachers": ["t"]},
            {"id": "b", "messages": chat, "answers": {"text": ["x"]}, "answer": "x"},
        )
    )
    assert [row.id for row in rows] == ["a", "b"]


def test_an_unused_column_is_no_fault_and_is_noted_once(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "u"}]
    line = {"messages": chat, "prompt_id": "x", "answers": ["x"], "techer": "t", "source": "book", "context": {"a": 1}}
    unused: dict[str, str] = {}
    rows = read_rows(write(tmp_path, line, line), columns_of(ignore=["source"]), unused=unused)
    assert [row.answer for row in rows] == [None, None]
    assert unused == {"prompt_id": "", "answers": "answer", "techer": "teacher", "context": ""}
    with pytest.raises(DataError, match=r"has no `answer` to grade against; it has a column 'answers'"):
        read_rows(write(tmp_path, line), columns_of(), need_answers=True)


def test_columns_that_a_template_or_a_mapping_reads_are_used(tmp_path: Path) -> None:
    line = {"q": "1+1", "hint": "add", "meta": {"gold": "2"}, "solution": "2"}
    unused: dict[str, str] = {}
    mapping = columns_of(
        user_template="{q}?", teacher_template="{prompt} ({hint})\n{solution}", columns={"answer": "meta.gold"}
    )
    (row,) = read_rows(write(tmp_path, line), mapping, own_contexts=True, unused=unused)
    assert unused == {}
    assert row.teacher_messages is not None
    assert row.teacher_messages[-1].content == "1+1? (add)\n2"


def test_the_teachers_template_keeps_earlier_turns_and_takes_the_place_of_the_context(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    line = {"prompt": chat, "privileged_context": ["one", "two"]}
    mapping = columns_of(
        columns={"messages": "prompt", "context": "privileged_context"},
        teacher_template="{prompt}\n{privileged_context}",
    )
    (row,) = read_rows(write(tmp_path, line), mapping, own_contexts=True)
    assert row.context is None
    assert row.teacher_messages is not None
    assert [message.content for message in row.teacher_messages] == ["s", "u\none\ntwo"]


@pytest.mark.parametrize(
    ("line", "template", "part"),
    [
        ({"prompt": "p"}, "{prompt} x", "the row needs `messages`"),
        ({"messages": U, "d": None}, "{prompt} {d}", "column 'd' has no value"),
        ({"messages": U}, "{prompt} {d}", "there is no column 'd'"),
        (
            {"messages": [{"role": "user", "content": "u"}], "context": "c", "teacher_messages": []},
            None,
            "teacher_mess",
        ),
        ({"prompt": "p", "teacher_messages": U}, None, "needs `messages`"),
        ({"prompt": "p", "context": " "}, None, "context"),
    ],
)
def test_faulty_own_contexts_are_named(line: Any, template: str | None, part: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=re.escape(part)):
        read_rows(write(tmp_path, line), columns_of(teacher_template=template), own_contexts=True)


def test_own_contexts_are_read_only_on_demand(tmp_path: Path) -> None:
    line = {"prompt": "p", "context": ["a", "b"]}
    assert read_rows(write(tmp_path, line), columns_of())[0].context is None
    assert read_rows(write(tmp_path, line), columns_of(), own_contexts=True)[0].context == "a\nb"


def test_half_a_character_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = write(tmp_path, '{"id": "a", "prompt": "cut \\ud83d"}', '{"id": "b", "prompt": "whole \\ud83d\\ude00"}')
    with pytest.raises(DataError, match=rf"^{path}:1: holds half a character \('\\ud83d'") as error:
        read_rows(path)
    assert len(str(error.value).splitlines()) == 1
    path.write_bytes(b"\xef\xbb\xbf" + b'{"id": "a", "prompt": "p"}\r\n')
    assert read_rows(path)[0].prompt == "p"


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"prompt": [{"role": "user", "content": "u"}]}, "set data.columns to {messages: prompt}"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "u"}]}]}, "a list of parts, not text"),
        ({"messages": [{"role": "developer", "content": "u"}]}, "not 'developer'"),
        ([1], "expected an object with the columns of one row, got list"),
    ],
)
def test_forms_of_other_formats_are_named_with_the_remedy(row: Any, part: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        read_rows(write(tmp_path, {"id": "a", **row} if isinstance(row, dict) else row))
    assert part in str(error.value)


def test_a_missing_relative_path_names_the_folder_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=rf"cannot read none\.jsonl: .* \(seen from {tmp_path}\)"):
        read_rows(Path("none.jsonl"))
