"""A configuration file into the models of `common.config.model`: YAML, ``key=value`` overrides, errors of one line."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from common.config.model import Config, ConfigError, Section, TeacherServerConfig

S = TypeVar("S", bound=Section)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a run's configuration; `overrides` are ``section.key=value`` with YAML values (``null`` unsets a key).

    Raises ConfigError, in one line, for a missing file, bad YAML, an unknown key or a bad value.
    """
    return validate(Config, read_tree(path, overrides))


def load_teacher_config(path: str | Path, overrides: Sequence[str] = ()) -> TeacherServerConfig:
    """Read only what a teacher server needs; other sections of the file may be there and are not looked at.

    ``teacher.model`` falls back to ``student.model`` of the same file.
    """
    tree = read_tree(path, overrides)
    teacher = dict(tree.get("teacher") or {})
    if teacher.get("model") is None:
        teacher["model"] = (tree.get("student") or {}).get("model")
    if teacher["model"] is None:
        raise ConfigError(f"{path}: teacher.model is missing (and there is no student.model to fall back to)")
    if teacher.get("kind", "frozen") != "frozen":
        raise ConfigError(
            f"{path}: teacher.kind `{teacher['kind']}` follows one run's student, and that run starts it: "
            "there is nothing to serve"
        )
    return validate(TeacherServerConfig, {"teacher": teacher})


def dump_config(config: Section) -> str:
    """The resolved whole as YAML; `load_config` reads it back to an equal value."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def validate(model: type[S], tree: dict[str, Any]) -> S:
    """`model` from plain values, with a validation error turned into one ConfigError line per mistake."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(model, detail) for detail in error.errors())) from None


def read_tree(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Sections of a file with the overrides applied, as plain values; raises ConfigError."""
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected sections such as `run:` and `student:`, got {type(tree).__name__}")
    for override in overrides:
        _apply(tree, override)
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
        node.pop(leaf, None)  # the key's own default, or "missing" if it has none
    else:
        node[leaf] = value


def _number_as_yaml_1_2(text: str) -> str | float:
    """PyYAML reads ``1e-5`` (no dot) as text; everyone who types it means the number."""
    try:
        return float(text) if "e" in text.lower() and text[:1] in "+-.0123456789" else text
    except ValueError:
        return text


def _explain(model: type[BaseModel], detail: Any) -> str:
    location = [part for part in detail["loc"] if isinstance(part, str)]
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"unknown key {key}={detail['input']!r}{_nearest_key(model, location)}"
    if detail["type"] == "missing":
        return f"missing key {key}"
    message = str(detail["msg"]).removeprefix("Value error, ")
    if not location:
        return message
    if detail["type"] == "value_error":
        return message
    hint = ""
    if detail["type"] == "literal_error":
        options = str(detail["ctx"]["expected"]).replace(" or ", ", ").replace("'", "").split(", ")
        close = difflib.get_close_matches(str(detail["input"]), options, n=1, cutoff=0.3)
        hint = f"; did you mean {close[0]}?" if close else ""
    return f"bad value {key}={detail['input']!r}: {message}{hint}"


def _nearest_key(model: type[BaseModel], location: Sequence[str]) -> str:
    """The same name in another section, else the closest in the same one, else the closest anywhere."""
    known = _keys(model)
    section, leaf = ".".join(location[:-1]), location[-1]
    beside = [name for name in known if name.rpartition(".")[0] == section]
    for candidates, cutoff in ((known, 1.0), (beside, 0.6), (known, 0.6)):
        leaves = {name.rpartition(".")[2]: name for name in reversed(candidates)}
        close = difflib.get_close_matches(leaf, leaves, n=1, cutoff=cutoff)
        if close:
            return f"; did you mean {leaves[close[0]]}?"
    return f" (valid here: {', '.join(sorted(name.rpartition('.')[2] for name in beside))})" if beside else ""


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
