"""Writes or checks a generated page of the documentation."""

from __future__ import annotations

import sys
from pathlib import Path


def with_table(page: str, begin: str, end: str, table: str) -> str:
    """Return the text `page` with `table` between the lines `begin` and `end`. Raises ValueError if it lacks one."""
    before, found, rest = page.partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise ValueError(f"the page has no line {(end if found else begin).strip()!r}")
    return f"{before}{begin}\n{table}\n{end}{after}"


def write_or_check(page: Path, wanted: str, arguments: list[str], *, command: str) -> int:
    """Write `wanted` to `page`, or only compare if `arguments` is ``["--check"]``. Returns the exit status."""
    if arguments != ["--check"]:
        page.write_text(wanted, encoding="utf-8")
        return 0
    if page.exists() and page.read_text(encoding="utf-8") == wanted:
        return 0
    print(f"{page.name} is out of date: {command}", file=sys.stderr)
    return 1
