"""What an engine has to end: closed in whatever way the engine comes to its end."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

PATIENCE_S = 60.0
"""How long the step that another thread is at is waited for: as long as it waits for a copy itself."""


class Closable(Protocol):
    """A part with threads of its own."""

    def close(self) -> None:
        """Ends them. May be called again, as after an interrupt."""


C = TypeVar("C", bound=Closable)


def close_all(parts: Iterable[Closable]) -> None:
    """Closes every part, whatever happens in one of them.

    Raises:
        BaseException: the first that closing a part ended with.
    """
    failures = []
    for part in parts:
        try:
            part.close()
        except BaseException as failure:
            failures.append(failure)
    if failures:
        raise failures[0]


class Resources:
    """What an engine owns that has threads.

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
        self._owned: list[Closable] = []
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

    def add(self, part: C) -> C:
        """Owns a part from now on."""
        self._owned.append(part)
        return part

    def close(self) -> None:
        """Closes all that is owned, whatever happens. May be called again.

        Raises:
            BaseException: the first that closing a part ended with.
        """
        self.closed = True
        if os.getpid() != self._process:  # a fork has none of the threads
            return
        entered = self.step.acquire(timeout=PATIENCE_S)
        try:
            close_all(self._owned)
            atexit.unregister(self._exit)
        finally:
            if entered:
                self.step.release()

    def _exit(self) -> None:
        if os.getpid() != self._process:
            return
        self.step.acquire(timeout=PATIENCE_S)  # for good: no other thread begins a step any more
        self.close()
