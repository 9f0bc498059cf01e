"""What of an engine has threads: closed together, in whatever way the engine comes to its end."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

PATIENCE_S = 60.0
"""How long the step that another thread is at is waited for: as long as it waits for a copy itself."""


class Room(Protocol):
    """Part of an engine with threads of its own."""

    def close(self) -> None:
        """Ends them. May be called again, as after an interrupt."""


R = TypeVar("R", bound=Room)


class Rooms:
    """The rooms of an engine.

    They are closed when the engine is, when nobody holds it any more, or when the interpreter exits, and then
    before JAX ends: a thread that is within JAX at that time aborts the process. So a user's daemon thread
    that generates is stopped there for good, after its step.

    Args:
        engine: whose they are.

    Attributes:
        closed: whether no step may begin any more.
        step: to be held during a step.
    """

    def __init__(self, engine: object):
        self.closed = False
        self._process = os.getpid()
        self.step = threading.RLock()
        self._rooms: list[Room] = []
        # At exit by `atexit` itself, in the reverse order of registering: JAX has registered before. When
        # `weakref.finalize` has its turn depends on who in this process used it first.
        weakref.finalize(engine, self.close).atexit = False
        atexit.register(self._exit)

    @contextmanager
    def opening(self) -> Iterator[None]:
        """While the engine is made: like a step, and if that fails, all is closed."""
        with self.step:
            try:
                yield
            except BaseException:
                self.close()
                raise

    def add(self, room: R) -> R:
        self._rooms.append(room)
        return room

    def close(self) -> None:
        """Closes every room, whatever happens in one of them. May be called again.

        Raises:
            BaseException: the first that closing a room ended with.
        """
        self.closed = True
        if os.getpid() != self._process:  # a fork has none of the threads
            return
        failures = []
        entered = self.step.acquire(timeout=PATIENCE_S)
        try:
            for room in self._rooms:
                try:
                    room.close()
                except BaseException as failure:
                    failures.append(failure)
            if failures:
                raise failures[0]
            atexit.unregister(self._exit)
        finally:
            if entered:
                self.step.release()

    def _exit(self) -> None:
        if os.getpid() != self._process:
            return
        self.step.acquire(timeout=PATIENCE_S)  # for good: no other thread begins a step any more
        self.close()
