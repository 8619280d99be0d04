"""Writes the tables of ``docs/results.md`` from ``docs/results/``: ``python -m deploy.docs_tools.results [--check]``.

``docs/results/NAME.json`` is the ``compare.json`` of a comparison that was run. Its table stands between the lines
``<!-- results of NAME -->`` and ``<!-- end of NAME -->``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from deploy.compare.table import methods_table
from deploy.docs_tools.pages import with_table, write_or_check

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "results.md"


def page() -> str:
    """The page with the table of every file. Raises ValueError if the page has no place for one."""
    text = PAGE.read_text(encoding="utf-8")
    for file in sorted((DOCS / "results").glob("*.json")):
        table = methods_table(json.loads(file.read_text(encoding="utf-8")))
        text = with_table(text, f"<!-- results of {file.stem} -->\n", f"<!-- end of {file.stem} -->", f"{table}\n")
    return text


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, page(), sys.argv[1:], command="python -m deploy.docs_tools.results"))
