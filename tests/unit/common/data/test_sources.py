"""Rows from Parquet, data sets and generators, with mapped columns."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from common.config.model import DataConfig
from common.data import sources
from common.data.rows import DataDigest, DataError, Row, read_rows
from common.data.sources import is_file, read_records
from learner.data.games import environment_error

TABLE: list[dict[str, Any]] = [
    {"question": "2 + 2?", "opa": "3", "opb": "4", "cop": 1, "truth": {"value": "4"}},
    {"question": "3 {x}?", "opa": "5", "opb": "6", "cop": 0, "truth": {"value": "5"}},
]


def data(**keys: Any) -> DataConfig:
    return DataConfig(train=Path("train.jsonl"), **keys)


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    import pyarrow
    from pyarrow.parquet import write_table

    path = tmp_path / "rows.parquet"
    write_table(pyarrow.Table.from_pylist(TABLE), path)
    return path


def test_parquet_rows_get_a_turn_labels_and_the_rows_number(parquet: Path) -> None:
    rows = read_rows(
        parquet,
        data(columns={"answer": "cop"}, labels=["A", "B"], user_template="{question}\nA. {opa}\nB. {opb}"),
        need_answers=True,
    )
    assert [row.id for row in rows] == ["0", "1"]
    assert [row.answer for row in rows] == ["B", "A"]
    assert rows[0].messages is not None
    assert rows[0].messages[0].content == "2 + 2?\nA. 3\nB. 4"
    assert rows[1].messages is not None
    assert rows[1].messages[0].content.startswith("3 {x}?")  # braces of the data are no places


def test_a_parquet_table_is_read_in_batches(parquet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(read_records(parquet))
    monkeypatch.setattr(sources, "PARQUET_BATCH_ROWS", 1)
    assert list(read_records(parquet)) == whole
    assert len(whole) > 1


def test_dots_reach_into_a_column(parquet: Path) -> None:
    rows = read_rows(parquet, data(columns={"answer": "truth.value", "prompt": "question"}))
    assert [(row.prompt, row.answer) for row in rows] == [("2 + 2?", "4"), ("3 {x}?", "5")]


@pytest.mark.parametrize(
    ("keys", "part"),
    [
        (
            {"columns": {"answer": "solution"}, "user_template": "x"},
            "data.columns.answer: there is no column 'solution'",
        ),
        ({"columns": {"answer": "truth.valeu"}, "user_template": "x"}, "no column 'truth.valeu'"),
        ({"user_template": "{questoin}"}, "data.user_template: there is no column 'questoin', only"),
        ({"columns": {"answer": "cop"}, "user_template": "x", "labels": ["A"]}, "answer 1 has no label"),
    ],
)
def test_a_missing_column_is_named_with_key_and_row(parquet: Path, keys: dict[str, Any], part: str) -> None:
    with pytest.raises(DataError) as error:
        read_rows(parquet, data(**keys))
    assert part in str(error.value)
    assert "rows.parquet row 0: " in str(error.value)


def test_columns_of_json_lines_are_mapped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"key": "a", "question": "q", "target": 3}\n')
    (row,) = read_rows(path, data(columns={"id": "key", "prompt": "question", "answer": "target"}))
    assert (row.id, row.prompt, row.answer) == ("a", "q", "3")


def test_a_renamed_column_loses_its_old_name(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"id": "a", "prompt": [{"role": "user", "content": "q"}], "answer": "x"}) + "\n")
    (row,) = read_rows(path, data(columns={"messages": "prompt"}))
    assert row.prompt is None
    assert row.messages is not None
    assert row.messages[0].content == "q"
    assert row.answer == "x"


def test_a_dataset_of_a_folder_with_a_slice_of_a_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "quiz"
    folder.mkdir()
    (folder / "train.jsonl").write_text(
        "".join(json.dumps({"prompt": f"q{i}", "answer": "x"}) + "\n" for i in range(4))
    )
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = read_rows(Path(f"hf:{folder}/train[1:3]"))
    assert [(row.id, row.prompt) for row in rows] == [("0", "q1"), ("1", "q2")]
    with pytest.raises(DataError, match=r"hf:.*quiz/test"):
        read_rows(Path(f"hf:{folder}/test"))


def test_a_missing_dataset_is_named_with_the_places_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(name: str, config: str | None, split: str) -> None:
        raise ConnectionError(f"Couldn't reach '{name}' on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError) as error:
        read_rows(Path("hf:team/quiz:main/train"))
    assert "hf:team/quiz:main/train" in str(error.value)
    assert str(datasets.config.HF_DATASETS_CACHE) in str(error.value)
    assert "Couldn't reach 'team/quiz'" in str(error.value)


@pytest.mark.parametrize("source", ["hf:quiz", "hf:/train", "hf:quiz/"])
def test_a_dataset_needs_name_and_split(source: str) -> None:
    with pytest.raises(DataError, match="expected hf:NAME/SPLIT"):
        read_rows(Path(source))


def test_games_are_rows_with_consecutive_seeds() -> None:
    rows = read_rows(Path("game:FrozenLake?rows=3&seed=7&size=4"), need_answers=True, check=environment_error)
    assert [(row.id, row.environment, row.seed) for row in rows] == [
        (f"FrozenLake-{s}", "FrozenLake", s) for s in (7, 8, 9)
    ]
    assert rows[0].options == {"size": 4}
    with pytest.raises(DataError, match="sizes"):
        read_rows(Path("game:FrozenLake?sizes=4"), check=environment_error)
    with pytest.raises(DataError, match="expected NAME"):
        read_rows(Path("game:FrozenLake?size"))


def test_procedural_tasks_are_rows_that_depend_on_the_seed() -> None:
    first, again, other = (
        read_rows(Path(f"reasoning_gym:chain_sum?size=3&seed={seed}"), need_answers=True) for seed in (1, 1, 2)
    )
    assert first == again
    assert len(first) == 3
    assert {row.id for row in first}.isdisjoint(row.id for row in other)
    with pytest.raises(DataError, match=r"tasks are .*chain_sum"):
        read_rows(Path("reasoning_gym:chain_sun?size=3"))


def test_a_digest_covers_the_file_or_the_rows(tmp_path: Path) -> None:
    def digest(rows: list[Row], **data: Any) -> str:
        found = DataDigest(DataConfig(**data))
        assert list(found.each(rows)) == rows
        return found.hexdigest()

    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": "a", "prompt": "p"}\n')
    rows = [Row(id="a", prompt="p")]
    assert digest(rows, train=path) == hashlib.sha256(path.read_bytes()).hexdigest()
    mapped = digest(rows, train=path, labels=("A",))
    assert mapped == digest(rows, train=Path("game:FrozenLake"))
    assert mapped != digest([Row(id="a", prompt="P")], train=Path("game:FrozenLake"))


def test_paths_and_generators_are_told_apart() -> None:
    assert is_file(Path("data/rows.jsonl"))
    assert is_file(Path("odd:name.jsonl"))
    assert not is_file(Path("hf:a/train"))
