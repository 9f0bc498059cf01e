"""Threads that help their caller with one call at a time, woken as fast as Python can."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Thread, current_thread

from layerscope_jax.support.jax_settings import settle_thread


class Job:
    """Parts of a call, by number, for threads to take.

    An interrupt may come to the caller between any two lines, more than once. So everything that is said here
    is said by one step that no interrupt divides, and waiting may be begun anew.
    """

    def __init__(self, call: Callable[[int], None], numbers: Iterable[int]):
        self.numbers = list(numbers)
        self._call = call
        self._helped: dict[int, bool] = {}  # whoever enters a number first has the part
        self._ended: list[BaseException | None] = []  # what each part that a helper took ended with
        self._news: SimpleQueue[None] = SimpleQueue()

    def do(self, number: int) -> None:
        """A helper's: does a part, unless the caller gave it up."""
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
        """Until every part was done; gives the first failure."""
        failure = self._failure(len(self.numbers))
        self._call = _nothing  # what it holds is let go of
        return failure

    def result(self) -> None:
        """As `wait`, but raises what was raised there."""
        failure = self.wait()
        if failure is not None:
            raise failure

    def give_up(self) -> BaseException | None:
        """Until nobody does a part any more; what no helper has begun is not begun."""
        return self._failure(sum([self._helped.setdefault(number, False) for number in self.numbers]))

    def _failure(self, count: int) -> BaseException | None:
        while len(self._ended) < count:
            self._news.get()  # news comes after what it is of: none that matters can be lost
        return next((failure for failure in self._ended if failure is not None), None)


def _nothing(number: int) -> None:
    pass


class Helpers:
    """Runs a call in several threads at once, the caller's own among them or not.

    A thread pool does the same, but its futures cost some 70 us more a call (`benchmarks/NOTES.md`). One
    caller at a time. After an interrupt it is through only when its helpers are; where a second interrupt
    came meanwhile, the next call waits for them first.

    Args:
        count: of threads beside the caller's.
        name: of the threads.
    """

    def __init__(self, count: int, name: str = "layerscope-cpu"):
        self._calls: SimpleQueue[tuple[Job, int] | None] = SimpleQueue()
        self._job: Job | None = None  # which may not have ended
        self._closed = False
        self._threads = [
            Thread(target=self._serve, name=f"{name}_{number}", daemon=True) for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def run(self, call: Callable[[int], None], threads: int) -> None:
        """Runs `call(number)` for 0 to `threads` - 1, at most one more than there are helpers.

        Raises:
            BaseException: the first that a call ended with, when all have ended.
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
        """Begins `call(number)` for each number, no more than there are helpers, and returns at once.

        Raises:
            ValueError: if the helpers were closed.
        """
        if self._job is not None:
            self.rest()
        if self._closed:
            raise ValueError("the threads that compute were closed with their engine; make a new Engine")
        job = Job(call, numbers)
        self._job = job  # before any helper has it: whatever interrupts, it is not forgotten
        for number in job.numbers:
            self._calls.put((job, number))
        return job

    def rest(self) -> BaseException | None:
        """Waits until no helper has anything to do; gives what went wrong in what it waited for."""
        job, failure = self._job, None
        if job is not None:
            failure = job.give_up()
            with suppress(Empty):  # parts that were given up
                while not self._closed:
                    self._calls.get_nowait()
            self._job = None
        return failure

    def close(self) -> None:
        """Ends the threads; those that compute go on to the end of it. May be called again."""
        self._closed = True
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            if thread is not current_thread():  # which may be the one that collects garbage
                thread.join()

    def _serve(self) -> None:
        settle_thread()
        while (part := self._calls.get()) is not None:
            part[0].do(part[1])
            del part  # and the arrays that it holds: a thread that waits at exit must not be their last owner
