"""Resident memory of this process, from Linux."""

from __future__ import annotations

from pathlib import Path


def reset_peak() -> int:
    """Let the process's peak resident memory start again from here; bytes resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident_bytes()


def resident_bytes() -> int:
    """Resident memory now."""
    return _status_bytes("VmRSS")


def peak_bytes() -> int:
    """Peak resident memory since `reset_peak`."""
    return _status_bytes("VmHWM")


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
