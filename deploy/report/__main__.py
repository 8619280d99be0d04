"""``python -m deploy.report RUN``: write the page of a run."""

from __future__ import annotations

import sys
from pathlib import Path

from deploy.report.writing import write_report

if __name__ == "__main__":
    print(write_report(Path(sys.argv[1])))
