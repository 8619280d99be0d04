"""Limits below the application: the connection ends if headers are slow or endless, or if a reply is not read."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADERS_TIMEOUT_S = 10.0
"""Time for the headers, from the opening of a connection or from the first byte of a later request."""

LINGER_S = 5.0
"""Time for which the rest of a refused body is read and thrown away."""

UNREAD_S = 30.0
"""A client may leave n bytes of a reply unread for `UNREAD_S` + n / `MIN_BYTES_PER_S`.

n leaves out the bytes in the kernel's buffers. The kernel buffers megabytes, which the client reads first: hence 30 s.
"""

MIN_BYTES_PER_S = 256 * 1024
"""Slowest average rate of a body or of a reply."""

MAX_HEADER_BYTES = 32 * 1024

MAX_PIPELINED = 4
"""Requests that one connection may send ahead. uvicorn would make objects of all that it reads."""

MAX_CONNECTIONS = 2048
"""Connections of all clients. At the bound a new one replaces the one that has had no request for longest."""


class LimitedHttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol, which limits neither the size and time of headers nor the time of a reply."""

    _receiving: asyncio.TimerHandle | None = None
    _sending: asyncio.TimerHandle | None = None
    _header_bytes = 0
    _idle_since = 0.0

    def connection_made(self, transport: Any) -> None:
        """Start the timer of the first headers."""
        super().connection_made(transport)
        # `pause_writing` then comes with the first byte that the client does not take, `resume_writing` with the last.
        transport.set_write_buffer_limits(high=1, low=0)  # TLS would pause at every empty buffer with high=0
        self._limit_receiving(HEADERS_TIMEOUT_S)
        self._idle_since = self.loop.time()
        if len(self.connections) > MAX_CONNECTIONS:
            known = cast("set[LimitedHttpProtocol]", self.connections)
            idle = [one for one in known if one.cycle is None or one.cycle.response_complete]
            min(idle, key=lambda one: one._idle_since).transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        self._limit_receiving(None)
        self._limit_sending(None)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Start the timer of the unread bytes. uvicorn writes the next ones only after the client took these."""
        super().pause_writing()
        self._limit_sending(UNREAD_S + self.transport.get_write_buffer_size() / MIN_BYTES_PER_S)

    def resume_writing(self) -> None:
        """The client took all bytes."""
        self._limit_sending(None)
        super().resume_writing()

    def on_message_begin(self) -> None:
        """Start the timer of this request's headers."""
        super().on_message_begin()
        self._limit_receiving(HEADERS_TIMEOUT_S)

    def on_headers_complete(self) -> None:
        """The application limits the body. The parser turns the exception into a 400 that ends the connection."""
        if len(self.pipeline) >= MAX_PIPELINED:
            raise ValueError(f"more than {MAX_PIPELINED} requests were sent ahead")
        self._limit_receiving(None)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The body is complete, read or thrown away."""
        self._limit_receiving(None)
        super().on_message_complete()
        self.cycle.more_body = False

    def on_response_complete(self) -> None:
        """Throw away the rest of a refused body for a while.

        Closing at once would reset the connection: a client that still sends could not read the reply.
        """
        self._idle_since = self.loop.time()
        if self.cycle.more_body and not self.transport.is_closing():
            self._limit_receiving(LINGER_S)
        super().on_response_complete()

    def data_received(self, data: bytes) -> None:
        """Count the bytes of incomplete headers."""
        super().data_received(data)
        in_body = self.cycle is not None and self.cycle.more_body
        if self._receiving is None or in_body:
            self._header_bytes = 0
            return
        self._header_bytes += len(data)
        if self._header_bytes > MAX_HEADER_BYTES:
            self.transport.abort()

    def _limit_receiving(self, seconds: float | None) -> None:
        self._receiving = self._restart(self._receiving, seconds)

    def _limit_sending(self, seconds: float | None) -> None:
        self._sending = self._restart(self._sending, seconds)

    def _restart(self, timer: asyncio.TimerHandle | None, seconds: float | None) -> asyncio.TimerHandle | None:
        if timer is not None:
            timer.cancel()
        return None if seconds is None else self.loop.call_later(seconds, self.transport.abort)
