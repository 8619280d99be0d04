"""What a dry run looks at: everything a run reads, and by name whatever of it is not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from common.config.model import Config, ConfigError
from common.data.contexts import check_context
from common.data.rows import DataError


def check_data(config: Config) -> str:
    """Read and render every row as a run would, if the student's tokenizer is at hand; says what was checked.

    Nothing is fetched. Raises ConfigError or DataError, with a line for every part that is missing.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the hub's client is imported, which is below
    counts = _read_all(config)
    absent = [line for line in absent_models(config) if line]
    notes = "".join(f"\n# {line}" for line in absent)
    if not Path(config.student.model).is_dir():
        # A hub name, or a folder that is made later: the rows can be read, but not rendered.
        return f"# data is fine: {counts}; not rendered, {config.student.model} is no folder here{notes}"
    from learner.data.inputs import read_inputs

    inputs = read_inputs(config)
    longest = max(inputs.teacher_tokens().values())
    return f"# data is fine: {counts}; longest prompt on the teacher's side {longest} tokens{notes}"


def absent_models(config: Config) -> Iterator[str]:
    """A sentence for every model that is neither a folder nor in the hub's cache here."""
    named = {"student.model": config.student.model}
    named |= {
        f"{'teacher' if name == 'default' else f'teachers.{name}'}.model": section.model
        for name, section in config.named_teachers().items()
        if section.model is not None
    }
    for key, model in named.items():
        if not (Path(model) / "config.json").is_file() and not _is_cached(model):
            yield f"{key} {model} is not on this machine: no folder with a config.json, and not in the hub's cache"


def _is_cached(model: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(model, "config.json"), str)
    except HFValidationError:  # a path, and as such it was looked for
        return False


def _read_all(config: Config) -> str:
    """How many rows each set has. Raises DataError, or ConfigError, that names all that cannot be read."""
    from common.data.rows import read_rows

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
