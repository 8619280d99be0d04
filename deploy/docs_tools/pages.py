"""Writes or checks a generated page of the documentation."""

from __future__ import annotations

import sys
from pathlib import Path


def with_table(page: Path, begin: str, end: str, table: str) -> str:
    """Return the text of `page` with `table` between the lines `begin` and `end`."""
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(end)
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
