"""Writes ``docs/configuration.md`` from the configuration's models: ``python -m deploy.docs_tools.docs [--check]``."""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from common.config.model import Config
from deploy.docs_tools.pages import write_or_check

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"

HEAD = """\
# Configuration

<!-- Written by `python -m deploy.docs_tools.docs` from the classes in common/config/*.py: edit their docstrings. -->

One YAML file describes a run, section by section. `opcd train CONFIG key=value …` overrides single keys; `null` unsets
one. An unknown key or a bad value is refused before anything starts, with the nearest valid one.
`opcd train CONFIG --print-config` prints the complete configuration. `opcd teacher CONFIG` reads the `teacher` section
of the same file (`teacher.model` defaults to `student.model`).

Required keys: `run.name`, `student.model`, `data.train`, and one of `context.text`,
`context.file` and `context.pool`.
"""

NAMES = {int: "integer", float: "number", str: "text", bool: "`true`, `false`", Path: "path", type(None): "`null`"}
BOUNDS = ((Gt, "gt", ">"), (Ge, "ge", "≥"), (Lt, "lt", "<"), (Le, "le", "≤"))


def page() -> str:
    """Return the page."""
    tables = [section(name, model) for name, model in sections(Config)]
    meanings = attribute_docstrings(Config)
    mappings = [
        f"## {name}\n\n{meanings[name]}\n"
        for name, field in Config.model_fields.items()
        if typing.get_origin(field.annotation) is dict
    ]
    return "\n".join([HEAD, *tables, *mappings])


def sections(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield (dotted name, model) of every section in `model`, each before its inner sections."""
    for name, field in model.model_fields.items():
        if typing.get_origin(field.annotation) is dict:
            continue
        for member in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(member, type) and issubclass(member, BaseModel):
                yield prefix + name, member
                yield from sections(member, f"{prefix}{name}.")


def section(name: str, model: type[BaseModel]) -> str:
    """Return a section's heading, docstring and table."""
    meanings = attribute_docstrings(model)
    rows = [
        f"| `{name}.{key}` | {describe(field.annotation, field.metadata)} | {default_of(field)} | {meanings[key]} |"
        for key, field in model.model_fields.items()
    ]
    table = ["| key | value | default | |", "|---|---|---|---|", *rows]
    return "\n".join([f"## {name}", "", prose(inspect.getdoc(model) or ""), "", *table, ""])


def attribute_docstrings(model: type[BaseModel]) -> dict[str, str]:
    """Return the docstring after each field in a model's source, empty for a field without one."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(model))).body[0]
    assert isinstance(tree, ast.ClassDef)
    found = dict.fromkeys(model.model_fields, "")
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            text = below.value if isinstance(below, ast.Expr) else None
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                found[field.target.id] = prose(text.value)
    return found


def prose(text: str) -> str:
    """Return a docstring as one line of Markdown, safe in a table."""
    return re.sub(r"\s+", " ", text).strip().replace("``", "`").replace("|", "\\|")


def describe(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """Return a type in words: ``integer > 0``, the values of a literal, ``list of text``."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return describe(arguments[0], tuple(_constraints(arguments[1:])))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(member, metadata) for member in arguments)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"list of {describe(arguments[0])}"
    if origin is tuple:
        return f"list of {len(arguments)}: {describe(arguments[0])}"
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a section"
    limits = [
        f"{sign} {getattr(limit, name):g}" for limit in metadata for kind, name, sign in BOUNDS if type(limit) is kind
    ]
    return " ".join(
        [NAMES.get(annotation, getattr(annotation, "__name__", str(annotation))), ", ".join(limits)]
    ).strip()


def _constraints(metadata: Sequence[Any]) -> Iterator[Any]:
    for item in metadata:
        yield from item.metadata if isinstance(item, FieldInfo) else (item,)


def default_of(field: FieldInfo) -> str:
    """Return a field's default in YAML's notation, ``*required*`` for a field without one."""
    if field.is_required():
        return "*required*"
    value = field.get_default(call_default_factory=True)
    return f"`{json.dumps(value, default=str)}`".replace('`"', "`").replace('"`', "`")


def main(arguments: Sequence[str]) -> int:
    """Write the page, or with ``--check`` return 1 if it is not current."""
    return write_or_check(PAGE, page(), list(arguments), command="python -m deploy.docs_tools.docs")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
