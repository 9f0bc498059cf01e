"""The parts of an engine that have threads, and their end: with the engine, or at exit of the interpreter."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol, TypeVar

from layerscope_jax.runtime.turns import Turns
from layerscope_jax.support.errors import TransferError

PATIENCE_S = 60.0
"""Seconds to wait for a step of another thread, which itself waits at most this long for a copy."""


class Closable(Protocol):
    """A part with threads of its own."""

    def close(self) -> None:
        """Ends its threads. It may be called again, as after an interrupt."""


C = TypeVar("C", bound=Closable)


def close_all(parts: Iterable[Closable]) -> None:
    """Closes every part, even if closing one of them fails.

    Raises:
        BaseException: the first exception raised while closing a part.
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
    """The parts of an engine that have threads.

    They are closed when the engine is closed, when it is garbage-collected, or when the interpreter exits. A
    collection may begin in the middle of JAX's own code, which must not be entered again there: jaxlib 0.10.2
    then frees code objects that are in use (`Traceback::Get` keeps its frames by thread), and the process
    crashes. So no part calls JAX as it is closed; what has to be waited for is waited for before, by `close`.

    At exit they are closed before JAX shuts down, because a thread that is inside JAX at that time aborts the
    process. So a daemon thread that generates runs its current step to the end and no further one: it waits
    for its next turn until the process is gone. Only that step is waited for, not the whole call.

    Args:
        engine: the engine that owns the parts.
        turns: turns of the engine.

    Attributes:
        closed: whether the engine is closed, so that no step may begin.
    """

    def __init__(self, engine: object, turns: Turns):
        self.closed = False
        self._turns = turns
        self._owned: list[Closable] = []
        # Functions of `atexit` run in reverse order of registration, and JAX has registered its own already.
        # When `weakref.finalize` runs at exit depends on which code of the process used it first.
        self._collected = weakref.finalize(engine, self.close)
        self._collected.atexit = False
        atexit.register(self._exit)

    @contextmanager
    def opening(self) -> Iterator[None]:
        """Closes everything if the `with` block, which makes the engine's parts, fails."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def add(self, part: C) -> C:
        """Takes ownership of a part, and returns it."""
        self._owned.append(part)
        return part

    def drop(self, part: Closable) -> None:
        """Closes a part and forgets it."""
        self._owned.remove(part)
        part.close()

    def close(self, settle: Callable[[], None] | None = None) -> None:
        """Closes all parts, even if closing one of them fails. It may be called again.

        Args:
            settle: called first, unless this thread is in a step: programs of an interrupted step may be
                reading memory that goes with the parts. Its `TransferError` says nothing that matters any
                more. With it, any step of another thread is waited for, else at most `PATIENCE_S`.

        Raises:
            BaseException: the first exception raised while closing a part.
        """
        self.closed = True
        if self._turns.inherited:  # a fork has none of the threads
            return
        entered = self._turns.lock.acquire(timeout=PATIENCE_S if settle is None else -1)
        try:
            with suppress(TransferError):
                if settle is not None and not self._turns.is_mine:
                    settle()
        finally:
            try:
                close_all(self._owned)
                atexit.unregister(self._exit)
                self._collected.detach()
            finally:
                if entered:
                    self._turns.lock.release()

    def _exit(self) -> None:
        if self._turns.inherited:
            return
        self._turns.end(PATIENCE_S)
        self.closed = True
        close_all(self._owned)
