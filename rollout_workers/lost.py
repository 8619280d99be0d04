"""The error that both the engine and its worker know; apart, because the engine's module imports vLLM's world."""

from __future__ import annotations


class EngineLost(RuntimeError):
    """The engine's processes are gone: nothing this worker does will succeed again."""
