"""Two network namespaces of this machine, joined by a cable: two nodes that do not share a loopback device."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Namespace:
    """A network namespace with one address and a loopback device."""

    name: str
    address: str

    @property
    def prefix(self) -> list[str]:
        """Words before a command that is to run in it."""
        return ["ip", "netns", "exec", self.name]


def missing_rights() -> str | None:
    """The reason why this process cannot make namespaces; None if it can."""
    if os.getuid() != 0:
        return "network namespaces need root"
    return None if shutil.which("ip") else "network namespaces need the command `ip` (package iproute2)"


@contextmanager
def two_namespaces() -> Iterator[tuple[Namespace, Namespace]]:
    """Make them, and remove them at the end; their processes must have ended before."""
    tag = f"opcd{os.getpid()}"
    pair = Namespace(f"{tag}a", "10.213.0.1"), Namespace(f"{tag}b", "10.213.0.2")
    try:
        for one in pair:
            _ip("netns", "add", one.name)
        devices = [f"v{os.getpid()}{end}" for end in "ab"]
        _ip("link", "add", devices[0], "netns", pair[0].name, "type", "veth", "peer", devices[1], "netns", pair[1].name)
        for one, device in zip(pair, devices, strict=True):
            _ip("-n", one.name, "address", "add", f"{one.address}/24", "dev", device)
            for name in ("lo", device):
                _ip("-n", one.name, "link", "set", name, "up")
        yield pair
    finally:
        for one in pair:
            subprocess.run(["ip", "netns", "delete", one.name], check=False)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
