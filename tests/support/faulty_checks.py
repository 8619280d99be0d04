"""Checks that go wrong in every way, for the tests of the runner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from tests.gpu.report import Figure


def good(place: Any) -> Iterator[Figure]:
    yield Figure("value", 1.0, at_most=2.0)


def raises(place: Any) -> Iterator[Figure]:
    yield Figure("before", 1.0, at_most=2.0)
    raise ValueError("two\nlines")


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


def memory(place: Any) -> Iterator[Figure]:
    yield Figure("before", 1.0, at_most=2.0)
    raise OutOfMemoryError("CUDA out of memory. Tried to allocate 5 GiB")


def dies(place: Any) -> Iterator[Figure]:
    print("the last words", flush=True)
    yield Figure("before", 1.0, at_most=2.0)
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(place: Any) -> Iterator[Figure]:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (place.folder / "pid").write_text(str(child.pid))
    yield Figure("before", 1.0, at_most=2.0)
    time.sleep(600)


def imports(place: Any) -> Iterator[Figure]:
    import ray  # noqa: F401

    yield Figure("imported", 1.0, at_most=2.0)
