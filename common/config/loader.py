"""Loads a YAML file and ``key=value`` overrides into the models of `common.config.model`, with one line per mistake."""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from common.config.model import Config, ConfigError, Section, TeacherServerConfig
from common.files import seen_from

S = TypeVar("S", bound=Section)

RENAMED_KEYS = {
    "run.patience_s": "placement_timeout_s",
    "teacher.keys_file": "server_keys_file",
    "teacher.key_file": "client_key_file",
    "rollout.over_issue": "oversample_fraction",
    "environment.samples": "sample_format",
    "sync.parity_nats": "parity_rms_nats",
    "sync.drift_warn_nats": "mismatch_warn_nats",
    "sync.drift_stop_nats": "mismatch_stop_nats",
    "sync.drift_warn_share": "mismatch_warn_share",
    "sync.drift_stop_share": "mismatch_stop_share",
}
REMOVED_KEYS = {
    "rollout.colocated": "give worker, rank and teacher parts of one GPU instead, for example "
    "rollout.gpus_per_worker=0.5 and learner.gpus_per_rank=0.5 (docs/cluster.md)",
}
"""Keys that are gone -> what to do instead."""
RENAMED_VALUES = {("teacher.kind", "self"): "live"}
"""Old names that an error answers with the new one; they are not accepted."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a run's configuration. `overrides` are ``section.key=value`` with YAML values; ``null`` unsets a key.

    Raises ConfigError, one line per mistake, for an unreadable file, bad YAML, unknown keys and bad values.
    """
    return validate(Config, read_tree(path, overrides))


def load_teacher_config(path: str | Path, overrides: Sequence[str] = ()) -> TeacherServerConfig:
    """Read the `teacher` section for a server and ignore the other sections, except that ``teacher.model`` defaults to
    ``student.model``. Raises ConfigError as `load_config` does, and for a teacher that only its run can start.
    """
    tree = read_tree(path, overrides)
    teacher = dict(tree.get("teacher") or {})
    if teacher.get("model") is None:
        teacher["model"] = (tree.get("student") or {}).get("model")
    if teacher["model"] is None:
        raise ConfigError(f"{path}: teacher.model is missing, and so is its default, student.model")
    config = validate(TeacherServerConfig, {"teacher": teacher})
    if config.teacher.kind != "frozen":
        raise ConfigError(
            f"{path}: teacher.kind `{config.teacher.kind}` follows one run's student, and the run itself starts it: "
            "serve a `frozen` teacher"
        )
    return config


def dump_config(config: Section) -> str:
    """Return the resolved configuration as YAML; `load_config` reads it back to an equal value."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def validate(model: type[S], tree: dict[str, Any]) -> S:
    """Build `model` from plain values. Raises ConfigError with one line per mistake."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(model, detail) for detail in error.errors())) from None


def read_tree(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a file's sections as plain values and apply the overrides. Raises ConfigError."""
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}{seen_from(Path(path))}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected sections such as `run:` and `student:`, got {type(tree).__name__}")
    for override in overrides:
        _apply(tree, override)
    try:
        json.dumps(tree, ensure_ascii=False, default=str).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(f"{path}: holds half a character ({error.object[error.start]!a}), which is no text") from None
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    *parents, leaf = key.split(".")
    if not equals or not parents or not leaf:
        raise ConfigError(f"override {override!r}: expected section.key=value, for example learner.lr=1e-5")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not YAML: {' '.join(str(error).split())}") from error
    if isinstance(value, str):
        value = _number_as_yaml_1_2(value)
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {parent} is a value, not a section")
        node = child
    if value is None:
        node.pop(leaf, None)  # validation then takes the default or reports a missing key
    else:
        node[leaf] = value


def _number_as_yaml_1_2(text: str) -> str | float:
    """Convert ``1e-5`` to a number: PyYAML reads it as text, because it has no dot."""
    try:
        return float(text) if "e" in text.lower() and text[:1] in "+-.0123456789" else text
    except ValueError:
        return text


def _explain(model: type[BaseModel], detail: Any) -> str:
    location = [part for part in detail["loc"] if isinstance(part, str)]
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        renamed = RENAMED_KEYS.get(_first_teacher(key))
        if renamed is not None:
            return f"unknown key {key}: it is now {key.rpartition('.')[0]}.{renamed}"
        if key in REMOVED_KEYS:
            return f"unknown key {key}: {REMOVED_KEYS[key]}"
        return f"unknown key {key}={detail['input']!r}{_nearest_key(model, location)}"
    if detail["type"] == "missing":
        return f"missing key {key}"
    message = str(detail["msg"]).removeprefix("Value error, ")
    if not location or detail["type"] == "value_error":
        return message
    hint = ""
    if detail["type"] in ("tuple_type", "list_type") and isinstance(detail["input"], str):
        return f"bad value {key}={detail['input']!r}: expected a list: {key}=[{detail['input']}]"
    if detail["type"] == "literal_error":
        value = str(detail["input"])
        if (_first_teacher(key), value) in RENAMED_VALUES:
            return f"bad value {key}={value!r}: it is now `{RENAMED_VALUES[_first_teacher(key), value]}`"
        options = str(detail["ctx"]["expected"]).replace(" or ", ", ").replace("'", "").split(", ")
        close = difflib.get_close_matches(value, options, n=1, cutoff=0.3)
        hint = f"; did you mean {close[0]}?" if close else ""
    return f"bad value {key}={detail['input']!r}: {message}{hint}"


def _first_teacher(key: str) -> str:
    """Map ``teachers.NAME.key`` to ``teacher.key``; both have the same keys."""
    return re.sub(r"^teachers\..*\.", "teacher.", key)


def _nearest_key(model: type[BaseModel], location: Sequence[str]) -> str:
    """Suggest the same name in another section, else the closest in this section, else the closest in any section."""
    known = _keys(model)
    section, leaf = ".".join(location[:-1]), location[-1]
    same_section = [name for name in known if name.rpartition(".")[0] == section]
    for candidates, cutoff in ((known, 1.0), (same_section, 0.6), (known, 0.6)):
        leaves = {name.rpartition(".")[2]: name for name in reversed(candidates)}
        close = difflib.get_close_matches(leaf, leaves, n=1, cutoff=cutoff)
        if close:
            return f"; did you mean {leaves[close[0]]}?"
    names = ", ".join(sorted(name.rpartition(".")[2] for name in same_section))
    return f" (valid keys: {names})" if names else ""


def _keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        for kind in _members(field.annotation):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                keys.extend(_keys(kind, f"{prefix}{name}."))
    return keys


def _members(annotation: Any) -> tuple[Any, ...]:
    origin = typing.get_origin(annotation)
    return typing.get_args(annotation) if origin in (typing.Union, types.UnionType) else (annotation,)
