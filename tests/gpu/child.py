"""Process that runs checks for `tests.gpu.runner`: ``python -m tests.gpu.child REQUEST RESULTS``.

It appends JSON lines to RESULTS: ``{"begin": name}``, ``{"figure": {…}}``, ``{"end": name, "error": text or null}``.
"""

from __future__ import annotations

import importlib
import importlib.abc
import json
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.gpu.place import Place, free_memory
from tests.gpu.report import Figure


class Hidden(importlib.abc.MetaPathFinder):
    """Makes packages look as if they were not installed."""

    def __init__(self, packages: Sequence[str]) -> None:
        self._packages = set(packages)

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if name.partition(".")[0] in self._packages:
            raise ModuleNotFoundError(f"No module named {name!r} (hidden by --without)", name=name)


def one_line(error: BaseException) -> str:
    """The error's type and message in one line of at most 300 characters; out of memory says so."""
    text = " ".join(str(error).split())
    name = "out of memory" if type(error).__name__ == "OutOfMemoryError" else type(error).__name__
    return f"{name}: {text}"[:300]


def main(request: dict[str, Any], results: Path) -> None:
    """Run the requested checks one after the other."""
    sys.meta_path.insert(0, Hidden(request["without"]))
    with results.open("a", buffering=1) as out:

        def write(**line: Any) -> None:
            out.write(json.dumps(line) + "\n")

        for name, function in request["checks"]:
            print(f"=== {name}", flush=True)
            write(begin=name)
            try:
                for figure in figures(function, request["place"]):
                    write(figure=asdict(figure))
            except Exception as error:  # noqa: BLE001 - the error is the verdict
                traceback.print_exc()
                write(end=name, error=one_line(error))
            else:
                write(end=name, error=None)
            if "torch" in sys.modules:
                free_memory()


def figures(function: str, place: dict[str, Any]) -> Iterator[Figure]:
    """Import a check's ``module:function`` and run it."""
    module, _, attribute = function.partition(":")
    yield from getattr(importlib.import_module(module), attribute)(Place.of(place))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
