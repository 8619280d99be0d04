"""The checks of a dry run: read everything that a run reads and name each missing part."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from common.config.model import Config, ConfigError
from common.data.contexts import check_context
from common.data.rows import DataError, read_rows


def check_data(config: Config) -> str:
    """Read every row, and render it if the student's model is a local folder; return a summary of the checks.

    Downloads nothing. Raises ConfigError or DataError, with a line for each missing part.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # takes effect if set before huggingface_hub is imported, below
    counts = _read_all(config)
    notes = "".join(f"\n# {line}" for line in absent_models(config))
    if not Path(config.student.model).is_dir():
        # A hub name, or a folder that is written later: the rows can be read, but not rendered.
        return f"# data is fine: {counts}; not rendered, {config.student.model} is not a local folder{notes}"
    from learner.data.inputs import read_inputs

    inputs = read_inputs(config)
    longest = max(inputs.teacher_tokens().values())
    return f"# data is fine: {counts}; longest prompt on the teacher's side {longest} tokens{notes}"


def absent_models(config: Config) -> Iterator[str]:
    """Yield a line for each model that is neither a local folder nor in the hub's cache."""
    named = {"student.model": config.student.model}
    named |= {
        f"{'teacher' if name == 'default' else f'teachers.{name}'}.model": section.model
        for name, section in config.named_teachers().items()
        if section.model is not None
    }
    for key, model in named.items():
        if not (Path(model) / "config.json").is_file() and not _is_cached(model):
            yield f"{key} {model} is not on this machine: not a folder with a config.json, and not in the hub's cache"


def _is_cached(model: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(model, "config.json"), str)
    except HFValidationError:  # a path, which the caller has looked for
        return False


def _read_all(config: Config) -> str:
    """Count the rows of each set. Raises DataError or ConfigError with a line for each part that cannot be read."""
    counts: list[str] = []
    faults: list[Exception] = []
    try:
        check_context(config.context)
    except ConfigError as error:
        faults.append(error)
    for name, source in (("train", config.data.train), ("valid", config.data.valid), ("eval", config.data.eval)):
        try:
            rows = [] if source is None else read_rows(source, config.data, need_answers=name != "train")
            counts.append(f"{len(rows)} {name}")
        except DataError as error:
            faults.append(DataError(f"data.{name}: {error}"))
    if faults:
        kind = ConfigError if isinstance(faults[0], ConfigError) else DataError
        raise kind("\n".join([*map(str, faults), *absent_models(config)]))
    return ", ".join(counts)
