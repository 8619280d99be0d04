"""Where rows come from: a file, a data set of ``datasets``, or a generator, each as plain records with their place.

What a source is, is said by what stands before its colon; a path has none. Packages are imported when a source needs
them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import yaml

Record = tuple[str, Any]
"""(where it stands, for an error; its columns, or the text of a line that is no JSON)."""


class DataError(ValueError):
    """Rows that cannot be used: one line each, with file and line number."""


class NotJson(str):
    """Why a line could not be read."""


def read_records(source: Path) -> Iterator[Record]:
    """The records of `source`, in order; a line that is no JSON comes as `NotJson`.

    Raises DataError where the source cannot be read, naming what is missing and where it was looked for.
    """
    kind, colon, rest = str(source).partition(":")
    if colon and kind in GENERATORS:
        return GENERATORS[kind](rest)
    return _parquet(source) if source.suffix == ".parquet" else _json_lines(source)


def is_file(source: Path) -> bool:
    """Whether `source` is a path, rather than something that makes rows."""
    kind, colon, _ = str(source).partition(":")
    return not (colon and kind in GENERATORS)


def _json_lines(path: Path) -> Iterator[Record]:
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", _parsed(line)


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return NotJson(f"not JSON: {error}")


def _parquet(path: Path) -> Iterator[Record]:
    pyarrow = _need("pyarrow", f"{path}")
    from pyarrow import parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise DataError(f"cannot read {path}: {_short(error)}") from error
    yield from _numbered(str(path), rows)


def _hub(rest: str) -> Iterator[Record]:
    """``NAME[:CONFIG]/SPLIT``; NAME is a folder, or a name on the Hugging Face hub (or in this machine's cache)."""
    named, slash, split = rest.rpartition("/")
    name, _, config = named.partition(":")
    if not slash or not name or not split:
        raise DataError(f"data source hf:{rest}: expected hf:NAME/SPLIT or hf:NAME:CONFIG/SPLIT")
    datasets = _need("datasets", f"hf:{rest}")
    import httpx

    try:
        if (Path(name) / "dataset_dict.json").is_file():
            rows = datasets.load_from_disk(name)[split]
        else:
            rows = datasets.load_dataset(name, config or None, split=split)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError, httpx.HTTPError) as error:
        looked = f"no folder, not in {datasets.config.HF_DATASETS_CACHE}, not to be had from the hub"
        where = "" if Path(name).is_dir() else f"{name} is not here ({looked}): "
        raise DataError(f"data source hf:{rest}: {where}{_short(error)}") from error
    yield from _numbered(f"hf:{rest}", rows)


def _games(rest: str) -> Iterator[Record]:
    """``NAME?rows=N&seed=S&option=value…``: episodes that begin from S, S + 1, …"""
    name, options = _query(f"game:{rest}", rest)
    rows, seed = options.pop("rows", 256), options.pop("seed", 0)
    for number in range(seed, seed + rows):
        record = {"id": f"{name}-{number}", "environment": name, "options": options, "seed": number}
        yield f"game:{rest} row {number - seed}", record


def _reasoning_gym(rest: str) -> Iterator[Record]:
    """``TASK?size=N&seed=S&…``; the answer is the whole entry, which the grader `reasoning_gym` hands to its scorer."""
    source = f"reasoning_gym:{rest}"
    name, options = _query(source, rest)
    gym = _need("reasoning_gym", source)
    try:
        rows = gym.create_dataset(name, **options)
    except (ValueError, TypeError, AssertionError) as error:
        known = ", ".join(sorted(gym.factory.DATASETS))
        raise DataError(f"data source {source}: {_short(error)}; tasks are {known}") from error
    for number, entry in enumerate(rows):
        record = {
            "id": f"{name}-{options.get('seed', 0)}-{number}",
            "messages": [{"role": "user", "content": entry["question"]}],
            "answer": json.dumps(entry, default=str),
        }
        yield f"{source} row {number}", record


GENERATORS: Mapping[str, Callable[[str], Iterator[Record]]] = {
    "hf": _hub,
    "game": _games,
    "reasoning_gym": _reasoning_gym,
}


def _query(source: str, rest: str) -> tuple[str, dict[str, Any]]:
    name, _, query = rest.partition("?")
    try:
        return name, {key: yaml.safe_load(value) for key, value in parse_qsl(query, strict_parsing=bool(query))}
    except ValueError as error:
        raise DataError(f"data source {source}: expected NAME?key=value&key=value, {error}") from error


def _numbered(source: str, rows: Any) -> Iterator[Record]:
    """Rows of a table, numbered from 0: the number is the id of those that have no column `id`."""
    for number, row in enumerate(rows):
        yield f"{source} row {number}", {"id": number, **row}


def _need(module: str, source: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        extra = "reasoning" if module == "reasoning_gym" else "data"
        raise DataError(f"{source} needs the package {module}: pip install 'opcd[{extra}]'") from error


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
