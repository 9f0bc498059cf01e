"""The stepper: the thread that runs the engine's steps while there are requests."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, NamedTuple

from layerscope_jax.engine import Engine
from layerscope_jax.generation.completions import Token
from layerscope_jax.generation.handles import Handle
from layerscope_jax.serving.totals import Tally

if TYPE_CHECKING:
    from layerscope_jax.serving.jobs import Job

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Ticket:
    """A submitted prompt.

    Attributes:
        handle: its request.
        job: whom its tokens are for.
        index: which of the job's prompts it is.
        seen: number of its tokens that are published.
    """

    handle: Handle
    job: Job
    index: int
    seen: int = 0


class News(NamedTuple):
    """What a step has brought for a prompt.

    Attributes:
        ticket: the prompt.
        tokens: its new tokens.
        ended: whether there will be no more.
        error: why its request failed, if it did.
    """

    ticket: Ticket
    tokens: Sequence[Token]
    ended: bool
    error: BaseException | None = None


class Stepper:
    """Runs the engine's steps in a thread of its own, and publishes the tokens of each.

    A step that fails aborts the request that came last, which is the likeliest cause, and the others go on;
    so a fault that persists ends them one by one, and no step is repeated forever.

    Args:
        engine: runs the steps.
        publish: is given the news of a step and the time (s) of `time.perf_counter` when it ended, by the
            stepper's thread; it must not wait.

    Attributes:
        tally: totals of the engine's work.
    """

    def __init__(self, engine: Engine, publish: Callable[[list[News], float], None]):
        self._engine, self._publish = engine, publish
        self._inbox: SimpleQueue[Ticket | None] = SimpleQueue()
        self._told_to_end = False
        self.tally = Tally()
        self._thread = threading.Thread(target=self._run, name="layerscope-steps", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether steps can be run."""
        return self._thread.is_alive()

    def add(self, ticket: Ticket) -> None:
        """Takes a prompt, whose request was submitted to the engine."""
        self._inbox.put(ticket)

    def close(self, timeout: float) -> None:
        """Aborts all requests, and ends the thread after the step that it is running."""
        self._inbox.put(None)
        self._thread.join(timeout)

    def _run(self) -> None:
        live: list[Ticket] = []
        while self._take(live):
            failed, error = live[-1], None
            try:
                failed.handle.advance()
            except BaseException as raised:
                logger.exception("a step failed; the last request to come is aborted")
                error = raised
                failed.handle.cancel()
            now, news = time.perf_counter(), []
            self.tally.update(self._engine.account)
            for ticket in live:
                tokens, ended = ticket.handle.since(ticket.seen)
                ticket.seen += len(tokens)
                why = error if ticket is failed else None
                if tokens or ended or why:
                    news.append(News(ticket, tokens, ended or why is not None, why))
            over = {each.ticket for each in news if each.ended}
            live[:] = [ticket for ticket in live if ticket not in over]
            self._publish(news, now)

    def _take(self, live: list[Ticket]) -> bool:
        """Adds new prompts to the live ones, and waits for one if there are none; False at the end."""
        try:
            while live or not self._told_to_end:
                ticket = self._inbox.get(block=not live)
                if ticket is None:
                    self._told_to_end = True
                else:
                    live.append(ticket)
                if self._told_to_end:
                    for each in live:
                        each.handle.cancel()
        except Empty:
            return True
        return False
