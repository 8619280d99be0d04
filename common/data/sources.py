"""Sources of rows: files, data sets of ``datasets``, and generators, each read as plain records with a location.

The text before a source's colon names its kind; a path has none. A package is imported only when a source needs it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import yaml

from common.error_text import one_line
from common.files import seen_from

HALF_CHARACTER = re.compile("[\ud800-\udfff]")
"""Code points that UTF-8 cannot encode; text cut inside an emoji's escape sequence holds one."""

PARQUET_BATCH_ROWS = 256
"""Rows of a Parquet table that are Python objects at a time."""
PARQUET_BUFFER_BYTES = 1 << 20
"""Bytes of each column that the reader holds."""

Record = tuple[str, Any]
"""(location for an error line, columns or `InvalidJson`)."""


class DataError(ValueError):
    """Unusable rows: one line per row, with file and line number."""


class InvalidJson(str):
    """Parser's message for a line that is not JSON."""


def read_records(source: Path) -> Iterator[Record]:
    """Yield the records of `source` in order; a line that is not JSON becomes `InvalidJson`.

    A record without an `id` gets its number, counted from 0.

    Raises DataError, with the places searched, if the source cannot be read.
    """
    kind, colon, rest = str(source).partition(":")
    if colon and kind in GENERATORS:
        return GENERATORS[kind](rest)
    return _numbered(_parquet(source) if source.suffix == ".parquet" else json_lines(source))


def is_file(source: Path) -> bool:
    """Tell a path from a data set or generator."""
    kind, colon, _ = str(source).partition(":")
    return not (colon and kind in GENERATORS)


def json_lines(path: Path) -> Iterator[Record]:
    """Yield the lines of a file that are not blank. Raises DataError for an unreadable file."""
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as stream:  # U+2028 and the like end no line
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield f"{path}:{number}", _parsed(line)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}{seen_from(path)}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}") from error


def _parsed(line: str) -> Any:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        return InvalidJson(f"not JSON: {error}")
    escaped = "\\u" in line and "\\ud" in line.lower()
    half = HALF_CHARACTER.search(json.dumps(value, ensure_ascii=False)) if escaped else None
    if half is not None:
        return InvalidJson(f"holds half a character ({half.group()!a}, a surrogate without its pair), which is no text")
    return value


def _parquet(path: Path) -> Iterator[Record]:
    pyarrow = _need("pyarrow", f"{path}")
    from pyarrow import parquet

    number = 0
    try:
        # Without a bounded buffer the reader holds whole row groups.
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=PARQUET_BUFFER_BYTES) as table:
            for batch in table.iter_batches(PARQUET_BATCH_ROWS):
                for row in batch.to_pylist():
                    yield f"{path} row {number}", row
                    number += 1
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise DataError(f"cannot read {path}: {one_line(error)}{seen_from(path)}") from error


def _hub(rest: str) -> Iterator[Record]:
    """Read ``NAME[:CONFIG]/SPLIT``; NAME is a folder, or a hub name (downloaded or cached)."""
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
        searched = f"no such folder, not in {datasets.config.HF_DATASETS_CACHE}, not available from the hub"
        missing = "" if Path(name).is_dir() else f"{name} not found ({searched}): "
        raise DataError(f"data source hf:{rest}: {missing}{one_line(error)}") from error
    yield from _numbered((f"hf:{rest} row {number}", row) for number, row in enumerate(rows))


def _games(rest: str) -> Iterator[Record]:
    """Generate ``NAME?rows=N&seed=S&option=value…``: one episode per seed S, S + 1, …"""
    name, options = _query(f"game:{rest}", rest)
    rows, seed = options.pop("rows", 256), options.pop("seed", 0)
    for number in range(seed, seed + rows):
        record = {"id": f"{name}-{number}", "environment": name, "options": options, "seed": number}
        yield f"game:{rest} row {number - seed}", record


def _reasoning_gym(rest: str) -> Iterator[Record]:
    """Generate ``TASK?size=N&seed=S&…``; the answer is the whole entry, for the grader `reasoning_gym`."""
    source = f"reasoning_gym:{rest}"
    name, options = _query(source, rest)
    gym = _need("reasoning_gym", source)
    try:
        rows = gym.create_dataset(name, **options)
    except (ValueError, TypeError, AssertionError) as error:
        known = ", ".join(sorted(gym.factory.DATASETS))
        raise DataError(f"data source {source}: {one_line(error)}; tasks are {known}") from error
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


def _numbered(records: Iterable[Record]) -> Iterator[Record]:
    """Give each record without an `id` its number, counted from 0."""
    for number, (location, record) in enumerate(records):
        if isinstance(record, dict) and record.get("id") is None:
            record = {**record, "id": number}
        yield location, record


def _need(module: str, source: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        extra = "reasoning" if module == "reasoning_gym" else "data"
        raise DataError(f"{source} needs the package {module}: pip install 'opcd[{extra}]'") from error
