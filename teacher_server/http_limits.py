"""Limits below the application: headers that come too slowly, or never end, end the connection."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADERS_TIMEOUT_S = 10.0
"""From the opening of a connection, or the first byte of a later request, to the end of its headers."""

MAX_HEADER_BYTES = 32 * 1024


class LimitedHttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol, which itself limits neither the time nor the size of headers."""

    headers_timeout_s = HEADERS_TIMEOUT_S
    _headers_timer: asyncio.TimerHandle | None = None
    _header_bytes = 0

    def connection_made(self, transport: Any) -> None:
        """Start the clock: a connection must say something."""
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._stop_timer()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """Start the clock of this request's headers."""
        super().on_message_begin()
        self._start_timer()

    def on_headers_complete(self) -> None:
        """Headers are in: from here on the application's own limits hold."""
        self._stop_timer()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        """Count what came while headers are still open; a body that follows them is not counted."""
        super().data_received(data)
        if self._headers_timer is None:
            self._header_bytes = 0
            return
        self._header_bytes += len(data)
        if self._header_bytes > MAX_HEADER_BYTES:
            self.transport.abort()

    def _start_timer(self) -> None:
        self._stop_timer()
        self._headers_timer = self.loop.call_later(self.headers_timeout_s, self._cut)

    def _stop_timer(self) -> None:
        if self._headers_timer is not None:
            self._headers_timer.cancel()
            self._headers_timer = None

    def _cut(self) -> None:
        self._headers_timer = None
        self.transport.abort()
