"""Warnings of libraries about what opcd does on purpose, which would only worry a reader."""

from __future__ import annotations

import logging

EXPECTED = {
    "DeepSpeed": "Setting accelerator to CPU",
    "ray._private.authentication.authentication_token_setup": "Token authentication is enabled",
}
"""Logger -> start of its message. Without a GPU DeepSpeed computes on CPU, as `join_ranks` checks. A local Ray cluster
asks for a token, as it should."""


def hide_expected_warnings() -> None:
    """Drop the messages of `EXPECTED`, and no others, from this process's loggers."""
    for name, start in EXPECTED.items():
        logger = logging.getLogger(name)
        if not any(isinstance(one, _Expected) for one in logger.filters):
            logger.addFilter(_Expected(start))


class _Expected(logging.Filter):
    def __init__(self, start: str) -> None:
        super().__init__()
        self._start = start

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self._start)
