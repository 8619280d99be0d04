"""Limits below the application: headers that come too slowly, or never end, and replies that are not read, end the
connection.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADERS_TIMEOUT_S = 10.0
"""From the opening of a connection, or the first byte of a later request, to the end of its headers."""

LINGER_S = 5.0
"""How long the rest of a refused body is read and thrown away."""

UNREAD_S = 30.0
"""What of a reply the kernel does not take at once, n bytes, may take this and n over `SLOWEST_BYTES_PER_S` to be read;
its memory is held until then. The kernel takes megabytes, which are read first: they are what this time is for.
"""

SLOWEST_BYTES_PER_S = 256 * 1024

MAX_HEADER_BYTES = 32 * 1024


class LimitedHttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol, which itself limits neither the time nor the size of headers, nor the time of a reply."""

    headers_timeout_s = HEADERS_TIMEOUT_S
    unread_s = UNREAD_S
    _timer: asyncio.TimerHandle | None = None
    _unread_timer: asyncio.TimerHandle | None = None
    _header_bytes = 0

    def connection_made(self, transport: Any) -> None:
        """Start the clock: a connection must say something."""
        super().connection_made(transport)
        # `pause_writing` comes with the first byte that the peer does not take, `resume_writing` when it took the last.
        transport.set_write_buffer_limits(high=1, low=0)  # of 0, TLS makes a pause of every empty buffer
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks."""
        self._stop_timer()
        self._stop_unread_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Start the clock of what was just written: the next is written only after it was read."""
        super().pause_writing()
        self._stop_unread_timer()
        seconds = self.unread_s + self.transport.get_write_buffer_size() / SLOWEST_BYTES_PER_S
        self._unread_timer = self.loop.call_later(seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """All of it was read."""
        self._stop_unread_timer()
        super().resume_writing()

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
        """ScoredRollout before the body's end (it was refused): the rest is thrown away, for a while.

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

    def _stop_unread_timer(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None

    def _cut(self) -> None:
        self._timer = None
        self.transport.abort()
