"""Reads the import statements of the packages."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.paths import ROOT

SERVICES = ("rollout_workers", "teacher_server", "learner")


PACKAGES = ("common", *SERVICES, "deploy")


ENGINES = ("ray", "vllm", "deepspeed")


HEAVY = (*ENGINES, "torch", "transformers")


@dataclass(frozen=True)
class Import:
    """One import statement: its line, the imported name, and whether it runs when the module is imported."""

    file: str
    line: int
    module: str
    at_module_level: bool

    @property
    def importer(self) -> str:
        """The module that imports."""
        return module_name(self.file)

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def imports_of(source: str, file: str) -> list[Import]:
    """All imports of one file; those for the type checker alone are none. ``from p import m`` names ``p.m``."""
    return list(_walk(ast.parse(source), file, at_module_level=True))


def _walk(node: ast.AST, file: str, *, at_module_level: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(file, child.lineno, alias.name, at_module_level)
        elif isinstance(child, ast.ImportFrom):
            base = _base(child, file)
            for alias in child.names:
                yield Import(file, child.lineno, f"{base}.{alias.name}", at_module_level)
        elif isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for alternative in child.orelse:
                yield from _walk(alternative, file, at_module_level=at_module_level)
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _walk(child, file, at_module_level=at_module_level and not inside)


def _base(statement: ast.ImportFrom, file: str) -> str:
    """The absolute module name of a ``from`` import."""
    if not statement.level:
        return statement.module or ""
    package = list(Path(file).parent.parts)
    above = package[: len(package) - statement.level + 1]
    return ".".join([*above, *([statement.module] if statement.module else [])])


def module_name(file: str) -> str:
    """``learner.loop.run`` for ``learner/loop/run.py``, ``learner.loop`` for its ``__init__.py``."""
    return file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def modules_of(package: str) -> list[str]:
    """Every module of a package, the package itself included."""
    return [module_name(path.relative_to(ROOT).as_posix()) for path in sorted((ROOT / package).rglob("*.py"))]


def all_imports(packages: Sequence[str] = PACKAGES) -> list[Import]:
    """Every import statement of the packages."""
    found: list[Import] = []
    for package in packages:
        for path in sorted((ROOT / package).rglob("*.py")):
            found += imports_of(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
    return found


def loaded_by(modules: list[str]) -> set[str]:
    """Heavy packages that are in ``sys.modules`` after `modules` were imported in a fresh interpreter."""
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        f"print(*[name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())
