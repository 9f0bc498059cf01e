"""Turns: let one thread at a time use an engine, in the process that made it, outside of traced functions."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from layerscope_jax.support.jax_settings import own_settings

_first: int | None = None
"""Id of the process that made the first engine; the threads of engines exist only there."""


class Turns:
    """Lets one thread at a time use an engine, for one step (a turn); the others wait.

    The only code of callers that runs during a turn is policies, predictors and the like, which must not use
    the engine. So two threads never wait for each other.

    Attributes:
        lock: held during a turn.

    Raises:
        ValueError: in a traced function, and in a fork of a process that has had an engine.
    """

    def __init__(self) -> None:
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
        self.lock = threading.RLock()
        self._next = threading.RLock()  # held by the thread that is next; the last owner queues behind it
        self._owner: int | None = None  # the thread whose turn it is
        self._waiting: dict[int, None] = {}  # threads that wait for a turn

    @property
    def inherited(self) -> bool:
        """Whether this process is a fork of the engine's, and so has none of its threads."""
        return os.getpid() != self._process

    @property
    def is_mine(self) -> bool:
        """Whether this thread is in a turn."""
        return self._owner == threading.get_ident()

    @property
    def is_contended(self) -> bool:
        """Whether a thread waits for its turn."""
        return bool(self._waiting)

    def check(self) -> None:
        """Refuses a call that cannot get a turn.

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
        """Waits for a turn and holds it within the `with` block, under the engine's JAX settings.

        Threads that ask for turns all the time get them alternately.

        Raises:
            ValueError: as `check`, and if this thread is in a turn already.
        """
        self.check()
        me = threading.get_ident()
        if self._owner == me:
            raise ValueError(
                "the engine is running a step on this thread, from which this call was made: a policy, "
                "predictor, copy or signal handler cannot generate; call from on_token, or after the step"
            )
        try:
            self._waiting[me] = None
            with self._next:
                self.lock.acquire()
            self._owner = me
            self._waiting.pop(me, None)
            with own_settings():
                yield
        except BaseException:
            self._waiting.pop(me, None)
            raise
        finally:  # Python handles interrupts after calls: no call may come before the release
            if self._owner == me:
                self._owner = None
            try:  # noqa: SIM105
                self.lock.release()
            except RuntimeError:  # not held: the wait for it was interrupted
                pass

    @contextmanager
    def turn_if_free(self) -> Iterator[bool]:
        """Holds a turn within the `with` block if no other thread has it; yields whether it does.

        It is for book-keeping only: JAX's settings remain the caller's, and nothing is checked.
        """
        me = threading.get_ident()
        if self.inherited or self._owner == me:
            yield False
            return
        try:
            taken = self.lock.acquire(blocking=False)
            if taken:
                self._owner = me
            yield taken
        finally:
            if self._owner == me:
                self._owner = None
            try:  # noqa: SIM105
                self.lock.release()
            except RuntimeError:  # not held: another thread has the turn
                pass

    def end(self, timeout: float) -> None:
        """Takes the turn for good, after the step that another thread is running; no step begins afterwards.

        A thread that asks for a turn later waits forever, outside of native code. It is for the exit of the
        interpreter, when all other threads are daemons.

        Args:
            timeout: seconds to wait for the step that is running.
        """
        self._waiting[threading.get_ident()] = None
        self._next.acquire(timeout=timeout)
        self.lock.acquire(timeout=timeout)


def check_untraced(what: str) -> None:
    """Refuses to go on while JAX traces a function, because a traced array holds no numbers yet.

    Raises:
        ValueError: if JAX traces a function on this thread.
    """
    try:
        jax.sharding.get_mesh()  # no other public function tells
    except ValueError:
        raise ValueError(
            f"cannot {what} in a function that JAX traces (jit, vmap, grad, scan and the like); generate "
            "before, and pass the tokens in"
        ) from None
