"""Turns of an engine: one thread at a time, in the process that made it, outside of traced functions."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import jax

from layerscope_jax.support.jax_settings import own_settings

_first: int | None = None
"""The process that made the first engine of this program; the engine's threads exist only there."""


class Lock(Protocol):
    """A lock that its thread may take again, and no other thread may release."""

    def acquire(self, blocking: bool = True) -> bool: ...

    def release(self) -> None: ...


class Turns:
    """Turns of an engine, one step each; other threads wait meanwhile.

    The only code of a caller that runs within a turn is policies, predictors and the like, which must not use
    the engine; so two threads never wait for each other.

    Args:
        lock: reentrant lock that a turn holds.

    Raises:
        ValueError: in a traced function, and in a fork of a process that has had an engine.
    """

    def __init__(self, lock: Lock) -> None:
        global _first
        check_untraced("make an Engine")
        self._process = os.getpid()
        if _first is None:
            _first = self._process
        if _first != self._process:
            raise ValueError(
                f"this process ({self._process}) is a fork of one ({_first}) that has had an Engine: JAX "
                'does not work in such a process; start it with multiprocessing.get_context("spawn")'
            )
        self._lock = lock
        self._next = threading.RLock()  # held by the next thread; the last owner comes after it
        self._owner: int | None = None  # the thread whose turn it is
        self._waiting: dict[int, None] = {}  # threads that wait for a turn

    @property
    def inherited(self) -> bool:
        """Whether this process is a fork of the engine's, and so has none of its threads."""
        return os.getpid() != self._process

    @property
    def wanted(self) -> bool:
        """Whether a thread waits for its turn."""
        return bool(self._waiting)

    def check(self) -> None:
        """Refuses a call where no turn can be had.

        Raises:
            ValueError: in a fork of the engine's process, or within a traced function.
        """
        if self.inherited:
            raise ValueError(
                f"this Engine was made in another process ({self._process}), of which this one "
                f"({os.getpid()}) is a fork, without its threads; generate there, or start processes by "
                'multiprocessing.get_context("spawn") and make an Engine in each'
            )
        check_untraced("use an Engine")

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Within, the engine is this thread's, and so are JAX's settings.

        Threads that want it all the time have it one after another.

        Raises:
            ValueError: as `check`, and from within a turn of the same thread.
        """
        self.check()
        me = threading.get_ident()
        if self._owner == me:
            raise ValueError(
                "the engine is in the midst of a step that this call comes out of: a policy, predictor, "
                "copy or signal handler cannot generate; call from on_token, or when the step is over"
            )
        try:
            self._waiting[me] = None
            with self._next:
                self._lock.acquire()
            self._owner = me
            self._waiting.pop(me, None)
            with own_settings():
                yield
        except BaseException:
            self._waiting.pop(me, None)
            raise
        finally:  # an interrupt is taken up after calls: none may stand before the one that releases
            if self._owner == me:
                self._owner = None
            try:  # noqa: SIM105
                self._lock.release()
            except RuntimeError:  # the wait for it was interrupted
                pass

    @contextmanager
    def turn_if_free(self) -> Iterator[bool]:
        """Within, where it gives True, the engine is this thread's; it waits for nobody, and checks nothing.

        JAX's settings are as they were: for book-keeping alone.
        """
        me = threading.get_ident()
        if self.inherited or self._owner == me:
            yield False
            return
        try:
            taken = self._lock.acquire(blocking=False)
            if taken:
                self._owner = me
            yield taken
        finally:
            if self._owner == me:
                self._owner = None
            try:  # noqa: SIM105
                self._lock.release()
            except RuntimeError:  # it was not free
                pass


def check_untraced(what: str) -> None:
    """Refuses to go on while JAX traces a function: what is computed there are no numbers yet.

    Raises:
        ValueError: if it does.
    """
    try:
        jax.sharding.get_mesh()  # no other public function tells
    except ValueError:
        raise ValueError(
            f"expected to be outside of functions that JAX traces (jit, vmap, grad, scan and the like): one "
            f"cannot {what} in them; generate before, and pass the tokens in"
        ) from None
