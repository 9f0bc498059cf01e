"""The crew: workers that are given shards, watched, and replaced when they are lost.

A worker streams its lines to the process that runs the job, and that process alone writes them. So no row is
written twice, whatever workers do: a row counts once, and only of the worker that has it at the time
(`layerscope_jax.distributed.ledger`). A row is lost with its worker only if its line has not come yet, and
another worker then computes it. `map_batches` of Ray Data promises less: it runs a failed batch again as a
whole, what it has computed is lost with the process that runs it, and a worker that hangs stays where it is.

The crew asks a `Cluster` for everything that happens, its clock included: Ray's, or a simulated one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from layerscope_jax.distributed.cluster import Cluster, EndedError
from layerscope_jax.distributed.ledger import Ledger
from layerscope_jax.distributed.placing import Place, engines_per_node, free_places
from layerscope_jax.distributed.worker import Beat, Failure, Identity, Limits
from layerscope_jax.support import interrupts
from layerscope_jax.support.errors import LostWorkers
from layerscope_jax.support.exits import say

WAIT_S = 1.0
"""Time (s) between two looks at what is late, and at whether Ctrl-C came."""

NODES_S = 2.0
"""Time (s) between two looks at which nodes there are."""

START_S = 6 * 3600.0
"""Time (s) that a worker has to load the model, by default: it has no rows yet that would wait for it, and a
thousand workers may read for hours from one storage."""

SILENT_S = 120.0
"""Time (s) after which people are told that a worker has not loaded the model yet."""

Write = Callable[[int, bytes, bool], object]
"""Function that is given the number of a complete row, its line, and whether it ended with an error."""


class Located(Protocol):
    """A row, of which a crew need know no more than where it comes from."""

    @property
    def where(self) -> str: ...


@dataclass(eq=False)
class Hired:
    """A worker of the crew.

    Attributes:
        place: where it runs.
        actor: the cluster's handle.
        stream: what it is saying; None while it has nothing to do.
        heard: when it last said something.
        identity: None until its model is loaded.
        rows, tokens, experts, hits, busy_s: what it has done.
        lost: what became of it, if it was lost.
        is_late: whether people were told that it has not loaded the model yet.
    """

    place: Place
    actor: Any
    stream: Any
    heard: float
    identity: Identity | None = None
    rows: int = 0
    tokens: int = 0
    experts: int = 0
    hits: int = 0
    busy_s: float = 0.0
    lost: str | None = None
    is_late: bool = False

    @property
    def spot(self) -> tuple[str, int]:
        """Its node and number, which no other worker has meanwhile."""
        return self.place.node.id, self.place.number

    @property
    def name(self) -> str:
        """Its name in messages."""
        return f"worker {self.place.number} on node {self.place.node.name}"


class Crew:
    """The workers of a job; a context manager, whose end ends them.

    Args:
        cluster: where they run.
        workers: how many there are at most; None for one on each accelerator, or on each node without any.
        timeout_s: time (s) without a new token after which a worker is given up.
        start_timeout_s: time (s) that a worker has to load the model.
        retries: how often a row is given to another worker, and how often one is started on a node.
        exact: whether all must compute alike.
        say: is told of what was lost.

    Attributes:
        all: all workers that there were.
    """

    def __init__(
        self,
        cluster: Cluster,
        *,
        workers: int | None,
        timeout_s: float,
        retries: int,
        start_timeout_s: float = START_S,
        exact: bool = False,
        say: Callable[[str], object] = say,
    ):
        self._cluster, self._workers, self._say = cluster, workers, say
        self._timeout_s, self._retries, self._exact = timeout_s, retries, exact
        self._start_timeout_s = start_timeout_s
        self._per_node = engines_per_node(cluster.nodes(), workers)
        self._looked: float | None = None
        self._failed_starts: Counter[str] = Counter()
        self._losses: list[str] = []
        self._first: Hired | None = None
        self._has_warned = False
        self._at_work: dict[tuple[str, int], Hired] = {}
        self.all: list[Hired] = []

    @property
    def places(self) -> int:
        """Number of workers that there may be."""
        return len(free_places(self._cluster.nodes(), self._per_node, self._workers, (), ()))

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in list(self._at_work.values()):
            self._end(worker)

    def hire(self, most: int) -> None:
        """Starts workers where there are free places, `most` in all; they load the model meanwhile.

        Raises:
            LostWorkers: if there is no worker, and no place for another.
        """
        now = self._cluster.now()
        if len(self._at_work) >= most or (self._looked is not None and now - self._looked < NODES_S):
            return
        self._looked = now
        avoided = {node for node, count in self._failed_starts.items() if count > self._retries}
        nodes = self._cluster.nodes()
        free = free_places(nodes, self._per_node, self._workers, self._at_work.keys(), avoided)
        if not free and not self._at_work:
            raise LostWorkers(None, tuple(self._losses[-3:]) or ("the cluster has no node",))
        for place in free[: most - len(self._at_work)]:
            actor = self._cluster.start(place)
            worker = Hired(place, actor, self._cluster.call(actor, "start"), now)
            self._at_work[worker.spot] = worker
            self.all.append(worker)

    def work(
        self,
        shards: Iterable[tuple[int, ...]],
        rows: Sequence[Located],
        limits: Limits,
        write: Write,
        told: Callable[[int, int], object] = lambda tokens, workers: None,
    ) -> None:
        """Has all shards completed.

        Args:
            shards: numbers of the rows that belong together, in the order in which they are begun.
            rows: rows by their numbers.
            limits: what the engines must have room for.
            write: is given each row, as soon as its line has come.
            told: is given the new tokens of a beat, and how many workers there are.

        Raises:
            ValueError: if a worker refuses what the user gave, naming its node.
            LostWorkers: if the same rows have lost too many workers, or no worker is left.
            OSError: from `write`.
        """
        ledger = Ledger(shards, self._retries)
        try:
            self._work(ledger, rows, limits, write, told)
        except LostWorkers as lost:
            if not isinstance(lost.row, int):
                raise
            raise LostWorkers(rows[lost.row].where, lost.losses) from None

    def _work(
        self,
        ledger: Ledger,
        rows: Sequence[Located],
        limits: Limits,
        write: Write,
        told: Callable[[int, int], object],
    ) -> None:
        while ledger.left:
            interrupts.check()
            self.hire(len(ledger.given) + ledger.waiting)
            for worker in self._at_work.values():
                if worker.stream is None and (numbers := ledger.give(worker)) is not None:
                    self._send(worker, [(number, rows[number]) for number in numbers], limits)
            for worker in self._heard():
                self._take(worker, ledger, write, told)
            for worker in list(self._at_work.values()):
                self._watch(worker, ledger)

    def _watch(self, worker: Hired, ledger: Ledger) -> None:
        """Gives a worker up that has been silent for too long."""
        if worker.stream is None:
            return
        silent_s = self._cluster.now() - worker.heard
        if worker.identity is not None:
            if silent_s > self._timeout_s:
                self._lose(worker, ledger, f"no new token for {self._timeout_s:g} s")
        elif silent_s > self._start_timeout_s:
            self._lose(worker, ledger, f"no model loaded for {self._start_timeout_s:g} s")
        elif silent_s > SILENT_S and not worker.is_late:
            worker.is_late = True
            self._say(
                f"{worker.name} has not loaded the model for {SILENT_S:g} s: it may still read it, or wait "
                "for a core or an accelerator that another job of the cluster has"
            )

    def _send(self, worker: Hired, rows: list[tuple[int, Located]], limits: Limits) -> None:
        worker.heard = self._cluster.now()
        worker.stream = self._cluster.call(worker.actor, "run", rows, limits)

    def _heard(self) -> list[Hired]:
        """Returns the workers that have said something; waits for the first of them."""
        speaking = {worker.stream: worker for worker in self._at_work.values() if worker.stream is not None}
        return [speaking[stream] for stream in self._cluster.wait(list(speaking), WAIT_S)]

    def _take(self, worker: Hired, ledger: Ledger, write: Write, told: Callable[[int, int], object]) -> None:
        """Takes the next thing that a worker has said."""
        try:
            said = self._cluster.next(worker.stream)
        except StopIteration:
            worker.stream = None
            if ledger.end(worker):
                self._say(f"{worker.name} left rows out, which are given out again")
            return
        except EndedError as error:
            self._lose(worker, ledger, str(error))
            return
        now = self._cluster.now()
        if isinstance(said, Failure):
            if said.is_refusal:
                raise ValueError(f"node {worker.place.node.name}: {said.text}")
            self._lose(worker, ledger, said.text)
        elif isinstance(said, Identity):
            worker.identity = said
            self._compare(worker)
        else:
            assert isinstance(said, Beat)
            worker.busy_s += now - worker.heard
            worker.tokens += said.tokens
            worker.experts += said.experts
            worker.hits += said.hits
            for number, line, failed in said.lines:
                if ledger.note(worker, number):
                    write(number, line, failed)
                    worker.rows += 1
            told(said.tokens, len(self._at_work))
        worker.heard = now

    def _compare(self, worker: Hired) -> None:
        """Refuses a worker whose model is another than the first one's.

        Raises:
            ValueError: naming both nodes and what differs; also if they may round differently, and the job
                asks for exact numerics.
        """
        if self._first is None:
            self._first = worker
            return
        first, own = self._first.identity, worker.identity
        assert first is not None
        assert own is not None
        node, other = worker.place.node.name, self._first.place.node.name
        differing = [
            f"{name} {value}, not {first.model[name]}"
            for name, value in own.model.items()
            if value != first.model[name]
        ]
        if differing:
            raise ValueError(
                f"node {node} runs another model than node {other}: {'; '.join(differing)}; give all nodes "
                "the same checkpoint and formats"
            )
        if own.computes == first.computes:
            return
        differs = f"node {node} computes by {own.computes}, node {other} by {first.computes}"
        if self._exact:
            raise ValueError(
                f"{differs}: numerics='exact' holds where all compute alike; leave nodes of one kind out, or "
                "leave numerics at 'auto'"
            )
        if not self._has_warned:
            self._say(f"{differs}: the same prompt may get other tokens on one than on the other")
        self._has_warned = True

    def _lose(self, worker: Hired, ledger: Ledger, why: str) -> None:
        """Ends a worker, and has its unfinished rows given to another.

        Raises:
            LostWorkers: if those rows have been lost too often.
        """
        loss = f"node {worker.place.node.name}: {why}"
        worker.lost = why
        self._losses.append(loss)
        if not worker.rows:
            self._failed_starts[worker.place.node.id] += 1
        self._end(worker)
        count = ledger.lose(worker, loss)
        left = f"; {count} rows that it had go to another" if count else ""
        self._say(f"{worker.name} was lost ({why}){left}")

    def _end(self, worker: Hired) -> None:
        del self._at_work[worker.spot]
        worker.stream = None
        self._cluster.kill(worker.actor)
