"""Writes ``docs/licences.md`` with pip-licenses: ``python -m deploy.docs_tools.licences [--check]``."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from deploy.docs_tools.pages import write_or_check

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/licences.md"
LOCKS = (ROOT / "deploy/requirements/cpu.txt", ROOT / "deploy/requirements/cpu-nodeps.txt")

HEAD = """\
# Licences

<!-- Written by `python -m deploy.docs_tools.licences` for the packages of deploy/requirements/cpu*.txt. -->

opcd is under the Apache License 2.0. `make setup` installs these packages for CPU, developer tools included, each under
the licence that its metadata states. This repository contains no code of theirs.

| package | licence |
|---|---|
"""

STATED_ELSEWHERE = {
    "oss-harmony": "Apache License 2.0",
    "promql-parser": "MIT",
    "setuptools": "MIT",
    "zss": "BSD-3-Clause",
}
"""Licences that a package states in its files but not in its metadata."""


class UnstatedLicence(Exception):
    """A package whose metadata names no licence: look it up, then add it to `STATED_ELSEWHERE`."""


def page() -> str:
    """Return the page. Raises UnstatedLicence."""
    lines = [line for lock in LOCKS for line in lock.read_text(encoding="utf-8").splitlines()]
    names = [line.partition("==")[0] for line in lines if "==" in line and not line.startswith("#")]
    rows = [f"| {name} | {licence} |" for name, licence in licences(names)]
    return HEAD + "\n".join(rows) + "\n"


def licences(names: Iterable[str]) -> list[tuple[str, str]]:
    """Return (name, licence) of the installed ones among `names`, in alphabetical order. Raises UnstatedLicence."""
    command = [sys.executable, "-m", "piplicenses", "--format=json", "--with-system", "--packages", *names]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = {entry["Name"]: entry["License"] for entry in json.loads(done.stdout)}
    stated = found | {name: STATED_ELSEWHERE[name] for name in found if name in STATED_ELSEWHERE}
    if unstated := [name for name, licence in stated.items() if licence == "UNKNOWN"]:
        raise UnstatedLicence(", ".join(unstated))
    rows = ((name, text.splitlines()[0]) for name, text in stated.items())  # some packages state the whole text
    return sorted(rows, key=lambda row: row[0].lower())


def main(arguments: Sequence[str]) -> int:
    """Write the page, or with ``--check`` return 1 if it is not current."""
    return write_or_check(PAGE, page(), list(arguments), command="python -m deploy.docs_tools.licences")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
