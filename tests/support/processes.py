"""Processes of this machine, read from /proc, and its ports."""

from __future__ import annotations

import socket
import time
from pathlib import Path


def descendants(root: int) -> set[int]:
    """Process ids below `root`."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (OSError, IndexError):
                continue
    found = {root}
    while True:
        more = {pid for pid, parent in parents.items() if parent in found} - found
        if not more:
            return found - {root}
        found |= more


def alive(pids: set[int]) -> set[int]:
    """The ones of `pids` that still run; zombies do not."""
    left = set()
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            continue
        if state not in "ZX":
            left.add(pid)
    return left


def wait_until_gone(pids: set[int], seconds: float) -> bool:
    """Wait until none of `pids` runs; False if one still does after `seconds`."""
    deadline = time.monotonic() + seconds
    while alive(pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def assert_nothing_left(pids: set[int]) -> None:
    """All of `pids`, of which there is at least one, end within 20 s."""
    assert pids
    assert wait_until_gone(pids, 20), {pid: command_of(pid) for pid in alive(pids)}


def parent_of(pid: int) -> int:
    """Process id of the parent."""
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def command_of(pid: int) -> str:
    """Command line of a process; empty if it ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
    except OSError:
        return ""


def free_port() -> int:
    """A port of the loopback address that no process listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
