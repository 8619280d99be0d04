"""The ``opcd`` command: refuses a user's packages that hide opcd's, then runs the command line of ``deploy.cli``.

A top-level module, because each package of opcd may be the hidden one. Imports the standard library only.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("common", "deploy", "learner", "rollout_workers", "teacher_server")


def refuse_hidden_packages() -> None:
    """End the program, in one line, if Python imports one of opcd's packages from another place than this module."""
    for name in PACKAGES:
        found = find_spec(name)
        folders = [Path(each) for each in found.submodule_search_locations or ()] if found is not None else []
        if not folders or folders[0].resolve().parent != Path(__file__).resolve().parent:
            where = folders[0] if folders else found and found.origin
            print(
                f"opcd: `{name}` is imported from {where}, which hides opcd's package of that name: rename it, take "
                "its folder off PYTHONPATH, or start in another folder",
                file=sys.stderr,
            )
            sys.exit(2)


def main() -> None:
    """Run the ``opcd`` command line."""
    refuse_hidden_packages()
    from deploy.cli.main import main

    main()
