"""Pages of the documentation that are written by a program, and the check that they are current."""

from __future__ import annotations

import sys
from pathlib import Path


def write_or_check(page: Path, wanted: str, arguments: list[str], *, is_not_what: str, command: str) -> int:
    """Write `wanted` to `page`; with ``--check`` in `arguments` only compare. Returns the exit status."""
    if arguments != ["--check"]:
        page.write_text(wanted, encoding="utf-8")
        return 0
    if page.exists() and page.read_text(encoding="utf-8") == wanted:
        return 0
    print(f"{page.name} is not what {is_not_what}: {command}", file=sys.stderr)
    return 1
