"""The ``opcd`` command line: `main` registers the commands, one module for each or for a few.

Modules import heavy packages inside their functions. Importing this package ends the program, in one line, if a folder
on Python's path hides one of the other packages of opcd.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

for _name in ("common", "learner", "rollout_workers", "teacher_server"):
    _found = find_spec(_name)
    _folders = [Path(each) for each in _found.submodule_search_locations or ()] if _found is not None else []
    if not _folders or _folders[0].resolve().parent != Path(__file__).resolve().parents[2]:
        _where = _folders[0] if _folders else _found and _found.origin
        print(
            f"opcd: `{_name}` is imported from {_where}, which hides opcd's package of that name: rename it, or take "
            "its folder off PYTHONPATH",
            file=sys.stderr,
        )
        sys.exit(2)
