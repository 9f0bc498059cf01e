"""Threads that help their caller with one call at a time, woken as fast as Python can."""

from __future__ import annotations

import functools
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread


class Helpers:
    """Runs a call in several threads at once, the caller's own among them.

    A thread pool does the same, but its futures cost some 70 us more a call (`benchmarks/NOTES.md`).

    Args:
        count: of threads beside the caller's.
    """

    def __init__(self, count: int):
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._ended: SimpleQueue[BaseException | None] = SimpleQueue()
        self._threads = [
            Thread(target=self._serve, name=f"layerscope-cpu_{number}", daemon=True)
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def run(self, call: Callable[[int], None], threads: int) -> None:
        """Runs `call(number)` for 0 to `threads` - 1, at most one more than there are helpers.

        Raises:
            BaseException: the first that a call ended with, when all have ended.
        """
        for number in range(1, threads):
            self._calls.put(functools.partial(call, number))
        failures = []
        try:
            call(0)
        except BaseException as failure:
            failures.append(failure)
        failures += [failure for failure in (self._ended.get() for _ in range(1, threads)) if failure]
        if failures:
            raise failures[0]

    def close(self) -> None:
        """Ends the threads; those that compute go on to the end of it."""
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            thread.join()

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            failure = None
            try:
                call()
            except BaseException as raised:
                failure = raised
            del call  # and the arrays that it holds: a thread that waits at exit must not be their last owner
            self._ended.put(failure)
