"""Limits below the application: headers that come too slowly, or never end, end the connection."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADERS_TIMEOUT_S = 10.0
"""From the opening of a connection, or the first byte of a later request, to the end of its headers."""

LINGER_S = 5.0
"""How long the rest of a refused body is read and thrown away."""

MAX_HEADER_BYTES = 32 * 1024


class LimitedHttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol, which itself limits neither the time nor the size of headers."""

    headers_timeout_s = HEADERS_TIMEOUT_S
    _timer: asyncio.TimerHandle | None = None
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

    def on_message_complete(self) -> None:
        """The body is in, or was thrown away to its end."""
        self._stop_timer()
        super().on_message_complete()
        self.cycle.more_body = False

    def on_response_complete(self) -> None:
        """Answered before the body's end (it was refused): the rest is thrown away, for a while.

        Closing at once would reset the connection under a client that is still sending and has not read the answer.
        """
        if self.cycle.more_body and not self.transport.is_closing():
            self._start_timer(LINGER_S)
        super().on_response_complete()

    def data_received(self, data: bytes) -> None:
        """Count what came while headers are still open; a body that follows them is not counted."""
        super().data_received(data)
        in_body = self.cycle is not None and self.cycle.more_body
        if self._timer is None or in_body:
            self._header_bytes = 0
            return
        self._header_bytes += len(data)
        if self._header_bytes > MAX_HEADER_BYTES:
            self.transport.abort()

    def _start_timer(self, seconds: float | None = None) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(self.headers_timeout_s if seconds is None else seconds, self._cut)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _cut(self) -> None:
        self._timer = None
        self.transport.abort()
