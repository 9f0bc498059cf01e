"""Connections: how many there are at once, and that their clients send and take what they have to in time."""

from __future__ import annotations

import asyncio
from itertools import chain
from typing import ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from layerscope_jax.serving.refusals import Refusal

LATE = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"

WHY_FULL = Refusal(503, "requests of all connections are being answered; try again later").body()
FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\nretry-after: 1\r\n"
    b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(WHY_FULL), WHY_FULL)
)

MOST = 4096
"""Most connections unless the settings say otherwise, if the system would allow more."""


class TimedConnection(H11Protocol):
    """A connection that is closed if its client takes too long, or if another needs its place.

    The head of a request must come in time, and so must the rest of a request that was answered before it had
    come; a client must take some of what it is sent in time. uvicorn waits forever for all of these. The
    bodies of other requests are timed by whoever reads them.

    If there are too many connections, a new one takes the place of the one that has waited longest for the
    rest of its request, or if there is none, for its next request. So connections that are only held open
    cost nobody else an answer. A request that is being answered is never given up for another.

    Attributes:
        most: most connections at once.
        unfinished: those of which no request, or part of one, has come, the oldest first.
        idle: those whose last request was answered, the one answered longest ago first.
    """

    timeout_s: ClassVar[float] = 30.0
    most: ClassVar[int] = MOST
    unfinished: ClassVar[dict[TimedConnection, None]]
    idle: ClassVar[dict[TimedConnection, None]]
    _is_extra = False
    _to_come: asyncio.TimerHandle | None = None
    _to_take: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Makes room for the connection, and starts the clock for its first request."""
        super().connection_made(transport)
        self._is_extra = self._are_too_many() and not self._has_displaced()
        self._set_clock()
        self._sort()

    def data_received(self, data: bytes) -> None:
        """Starts the clock with the first part of a head, and stops it with the last."""
        if self._is_extra and self._are_too_many():  # said only now: unread data would make it get lost
            self.transport.write(FULL)
            self.transport.close()
            return
        self._is_extra = False
        super().data_received(data)
        self._set_clock()
        self._sort()

    def on_response_complete(self) -> None:
        """Begins to wait for the next request."""
        super().on_response_complete()
        self._sort()

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
        self._sort_into(None)

    def timeout_keep_alive_handler(self) -> None:
        """Closes an idle connection, whether or not its client takes what is left to be sent."""
        super().timeout_keep_alive_handler()
        self.loop.call_later(self.timeout_s, self.transport.abort)

    def _are_too_many(self) -> bool:
        return len(self.connections) > self.most

    def _has_displaced(self) -> bool:
        """Closes another connection, and returns whether there was one that could be closed."""
        for other in chain(self.unfinished, self.idle):
            if not other.transport.get_write_buffer_size():  # it would otherwise lose the end of an answer
                other._sort_into(None)
                other.transport.abort()
                return True
        return False

    def _sort(self) -> None:
        """Puts the connection where others of its kind are, behind those that it was not yet among."""
        if self.transport.is_closing():
            self._sort_into(None)
        elif self.cycle is not None and self.cycle.response_complete:
            self._sort_into(self.idle)
        else:
            is_whole = self.cycle is not None and not self.cycle.more_body
            self._sort_into(None if is_whole else self.unfinished)

    def _sort_into(self, kind: dict[TimedConnection, None] | None) -> None:
        for each in (self.unfinished, self.idle):
            if each is kind:
                each.setdefault(self)
            else:
                each.pop(self, None)

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


def connection_class(timeout_s: float, most: int | None) -> type[TimedConnection]:
    """Returns the class of a server's connections.

    Args:
        timeout_s: time (s) that clients have.
        most: most connections at once; None for as many as the system lets a process have.
    """
    own = {"timeout_s": timeout_s, "most": most or most_by_files(), "unfinished": {}, "idle": {}}
    return type("Connection", (TimedConnection,), own)


def most_by_files() -> int:
    """Returns how many connections leave half of the files that a process may open to others."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return MOST
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MOST if files == resource.RLIM_INFINITY else max(1, min(MOST, files // 2))
