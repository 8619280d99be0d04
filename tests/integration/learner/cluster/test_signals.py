"""SIGTERM ends a driver in order, next to a real Ray, which has handlers for it as well."""

from __future__ import annotations

import signal
import subprocess
import sys

DRIVER = """
import asyncio
from learner.train import cluster, interruptible

async def run():
    print("ready", flush=True)
    try:
        await asyncio.sleep(120)
    except asyncio.CancelledError:
        await asyncio.sleep(5)  # a checkpoint takes longer than the three seconds that Ray's handler leaves
        print("saved", flush=True)
        raise

try:
    with cluster(), interruptible():
        asyncio.run(run())
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def test_a_terminated_driver_has_time_to_save() -> None:
    """Started with SIGINT ignored, as a script's background processes are."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", DRIVER], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        assert process.stdout is not None
        seen = []
        for line in process.stdout:
            seen.append(line.strip())
            if seen[-1] == "ready":
                process.terminate()
        assert process.wait(60) == 0, seen
    assert seen[-3:] == ["ready", "saved", "interrupted"]  # after Ray's words about its token
