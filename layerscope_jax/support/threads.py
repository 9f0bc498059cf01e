"""Helper threads for one call at a time, which are woken faster than those of a thread pool."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Thread, current_thread

from layerscope_jax.support.jax_settings import settle_thread

PATIENCE_S = 10.0
"""Seconds to wait for a thread that is told to end: the garbage collector may end an engine while the thread
that it runs on holds what the other one needs to end."""


class Job:
    """A call split into numbered parts, which threads take.

    An interrupt may reach the caller between any two lines, more than once. So every change of state is a
    single atomic step, and waiting can be repeated.
    """

    def __init__(self, call: Callable[[int], None], numbers: Iterable[int]):
        self.numbers = list(numbers)
        self._call = call
        self._helped: dict[int, bool] = {}  # the first to enter a number has that part
        self._ended: list[BaseException | None] = []  # the error, or None, of each part that a helper took
        self._news: SimpleQueue[None] = SimpleQueue()

    def do(self, number: int) -> None:
        """Runs a part, unless the caller gave it up; called by a helper."""
        if not self._helped.setdefault(number, True):
            return
        failure = None
        try:
            self._call(number)
        except BaseException as raised:
            failure = raised
        self._ended.append(failure)
        self._news.put(None)

    def wait(self) -> BaseException | None:
        """Waits until every part is done; returns the first failure."""
        failure = self._failure(len(self.numbers))
        self._call = _nothing  # frees what the call holds
        return failure

    def result(self) -> None:
        """Waits until every part is done; raises the first failure."""
        failure = self.wait()
        if failure is not None:
            raise failure

    def give_up(self) -> BaseException | None:
        """Waits until no part is being done; parts that no helper has begun are not begun."""
        return self._failure(sum([self._helped.setdefault(number, False) for number in self.numbers]))

    def _failure(self, count: int) -> BaseException | None:
        while len(self._ended) < count:
            self._news.get()  # put after the append above, so that no ended part is missed
        return next((failure for failure in self._ended if failure is not None), None)


def _nothing(number: int) -> None:
    pass


class Helpers:
    """Runs a call in several threads at once, with or without the caller's own, for one caller at a time.

    A thread pool does the same, but its futures cost some 70 us more a call. After an interrupt a call ends
    only when its helpers are idle; if a second interrupt comes meanwhile, the next call waits for them first.

    Args:
        count: number of threads beside the caller's.
        name: prefix of the threads' names.
        began: called in each thread when it begins, with its number from 1; None to call nothing.
    """

    def __init__(self, count: int, name: str = "layerscope-cpu", began: Callable[[int], None] | None = None):
        self._calls: SimpleQueue[tuple[Job, int] | None] = SimpleQueue()
        self._job: Job | None = None  # may still be running
        self._closed = False
        self._threads = [
            Thread(target=self._serve, args=(began, number + 1), name=f"{name}_{number}", daemon=True)
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def run(self, call: Callable[[int], None], threads: int) -> None:
        """Runs `call(number)` for 0 to `threads` - 1; `threads` is at most the number of helpers plus one.

        Raises:
            BaseException: the first that a call raised, after all have ended.
            ValueError: if the helpers were closed.
        """
        if threads < 2 and self._job is None:
            call(0)
            return
        failure: BaseException | None = None
        try:
            job = self.start(call, range(1, threads))
            try:
                call(0)
            except BaseException as raised:
                failure = raised
            others = job.wait()
            self._job = None
        except BaseException:
            self.rest()
            raise
        failure = failure or others
        if failure is not None:
            raise failure

    def start(self, call: Callable[[int], None], numbers: Iterable[int] = (0,)) -> Job:
        """Begins `call(number)` for each number, at most as many as there are helpers, and returns at once.

        Raises:
            ValueError: if the helpers were closed.
        """
        if self._job is not None:
            self.rest()
        if self._closed:
            raise ValueError("the threads that compute experts ended with their engine; make a new Engine")
        job = Job(call, numbers)
        self._job = job  # set before any helper has it, so that an interrupt cannot lose it
        for number in job.numbers:
            self._calls.put((job, number))
        return job

    def rest(self) -> BaseException | None:
        """Waits until every helper is idle; returns the failure of a job that nothing had waited for."""
        job, failure = self._job, None
        if job is not None:
            failure = job.give_up()
            with suppress(Empty):  # removes the parts that were given up
                while not self._closed:
                    self._calls.get_nowait()
            self._job = None
        return failure

    def close(self) -> None:
        """Ends the threads after their current parts. May be called again."""
        self._closed = True
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            if thread is not current_thread():  # garbage collection may run on a helper
                thread.join(PATIENCE_S)

    def _serve(self, began: Callable[[int], None] | None, number: int) -> None:
        settle_thread()
        if began is not None:
            began(number)
        while (part := self._calls.get()) is not None:
            part[0].do(part[1])
            del part  # frees its arrays: a waiting thread must not be their last owner at exit
