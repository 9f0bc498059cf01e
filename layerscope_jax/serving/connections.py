"""Connections whose clients must send and take what they have to in time."""

from __future__ import annotations

import asyncio
from typing import ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

LATE = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class TimedConnection(H11Protocol):
    """A connection that is closed if its client takes too long.

    The head of a request must come in time, and so must the rest of a request that was answered before it had
    come; a client must take some of what it is sent in time. uvicorn waits forever for all of these. The
    bodies of other requests are timed by whoever reads them.
    """

    timeout_s: ClassVar[float] = 30.0
    _to_come: asyncio.TimerHandle | None = None
    _to_take: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts the clock for the first request."""
        super().connection_made(transport)
        self._set_clock()

    def data_received(self, data: bytes) -> None:
        """Starts the clock with the first part of a head, and stops it with the last."""
        super().data_received(data)
        self._set_clock()

    def pause_writing(self) -> None:
        """Starts the clock for a client that takes less than it is sent."""
        super().pause_writing()
        self._to_take = self.loop.call_later(self.timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """Stops that clock."""
        super().resume_writing()
        if self._to_take is not None:
            self._to_take.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops all clocks."""
        super().connection_lost(exc)
        self.resume_writing()
        self._stop_clock()

    def timeout_keep_alive_handler(self) -> None:
        """Closes an idle connection, whether or not its client takes what is left to be sent."""
        super().timeout_keep_alive_handler()
        self.loop.call_later(self.timeout_s, self.transport.abort)

    def _set_clock(self) -> None:
        theirs = self.conn.their_state
        answered = theirs is h11.SEND_BODY and self.cycle is not None and self.cycle.response_complete
        if theirs is not h11.IDLE and not answered:
            self._stop_clock()
        elif self._to_come is None:
            self._to_come = self.loop.call_later(self.timeout_s, self._end)

    def _stop_clock(self) -> None:
        if self._to_come is not None:
            self._to_come.cancel()
            self._to_come = None

    def _end(self) -> None:
        if self.transport.is_closing():
            return
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self.transport.write(LATE)
        self.transport.close()
        self.loop.call_later(self.timeout_s, self.transport.abort)
