"""A job on a virtual clock: the crew of a real job, on nodes that load, compute and fail as they are told.

It answers what nobody can try out on a thousand nodes: how long a job takes, and how much of that is reading
checkpoints, waiting for the last rows, or computing what was lost. What decides is the code of a real job
(`layerscope_jax.distributed.crew`, `.ledger`, `.shards`); simulated are the nodes:

- All nodes that load share the storage's bandwidth evenly, each with its own network's as a limit.
- A worker has as many slots as `max_num_seqs`. A row in a slot gets a token each step, and a step takes the
  same time however many slots are in use, as where reading weights takes all the time. Prompts cost nothing.
- Workers end at random, at a constant rate, and come back at once. Some hang instead of completing a shard.
- Some nodes are slower than the others by a factor, all the time.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from layerscope_jax.distributed.cluster import EndedError
from layerscope_jax.distributed.crew import Crew
from layerscope_jax.distributed.placing import Node, Place
from layerscope_jax.distributed.worker import Beat, Identity, Limits


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """Nodes, and the storage that they read the checkpoint from.

    Attributes:
        nodes: number of nodes, with one worker each.
        checkpoint_bytes: size of the checkpoint; every worker reads all of it.
        node_bytes_per_s: what one node can read at most.
        storage_bytes_per_s: what all nodes together can read at most.
        slots: rows that a worker runs at once.
        step_s: time (s) of a step, in which each row in a slot gets a token.
        mean_life_s: time (s) after which a worker ends, on average; infinite for never.
        hang_rate: share of the shards given out at which a worker hangs.
        slow_share, slow_factor: share of the nodes that are slower, and how many times as long they take.
        beat_s: time (s) between two signs of life.

    >>> Fleet(nodes=10, checkpoint_bytes=10**9, storage_bytes_per_s=10**9).load_s
    10.0
    """

    nodes: int
    checkpoint_bytes: int = 0
    node_bytes_per_s: float = 3e9
    storage_bytes_per_s: float = 50e9
    slots: int = 32
    step_s: float = 0.05
    mean_life_s: float = math.inf
    hang_rate: float = 0.0
    slow_share: float = 0.0
    slow_factor: float = 1.0
    beat_s: float = 10.0

    @property
    def load_s(self) -> float:
        """Time (s) until all nodes have loaded the checkpoint, if they begin together."""
        together = self.nodes * self.checkpoint_bytes / self.storage_bytes_per_s
        return max(self.checkpoint_bytes / self.node_bytes_per_s, together)


class Ideal(NamedTuple):
    """What no job can be faster than.

    Attributes:
        work_s: time (s) of all rows, if every slot of every node were always in use.
        load_s: time (s) to load the checkpoint everywhere.
        longest_s: time (s) of the longest row alone.
    """

    work_s: float
    load_s: float
    longest_s: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a simulated job.

    Attributes:
        makespan_s: time (s) until the last row was complete.
        ideal: what no job can be faster than.
        lost: workers that were lost.
        lost_tokens: tokens computed in vain.
        read_bytes: bytes of checkpoints that were read.
        first_row_s, last_give_s: when (s) the first row was complete, and when the last shard was given out.
    """

    makespan_s: float
    ideal: Ideal
    lost: int
    lost_tokens: float
    read_bytes: float
    first_row_s: float
    last_give_s: float

    @property
    def efficiency(self) -> float:
        """Time of the work alone on ideal nodes, divided by the makespan."""
        return self.ideal.work_s / self.makespan_s


@dataclass(eq=False)
class Told:
    """A stream of what a worker says.

    Attributes:
        worker: says it.
        ready: what it has said.
        rows: of each row that it completes, if nothing happens to it: when it begins and when it says so, and
            the time (s) of a token.
    """

    worker: VirtualWorker
    ready: deque[Any] = field(default_factory=deque)
    rows: list[tuple[float, float, float]] = field(default_factory=list)


@dataclass(eq=False)
class VirtualWorker:
    """A worker of the virtual cluster.

    Attributes:
        place: where it is.
        pace: how many times as long as usual its steps take.
        stream: what it is saying; None if nobody has called it.
        has_ended: whether it has ended.
        left_bytes: of the checkpoint, while it loads.
    """

    place: Place
    pace: float
    stream: Told | None = None
    has_ended: bool = False
    left_bytes: float = 0.0


END = object()
"""Item at the end of a stream."""


class VirtualCluster:
    """A cluster on a virtual clock, as a crew needs one.

    Args:
        fleet: its nodes.
        tokens: tokens that each row takes, by its number.
        seed: of what happens by chance.

    Attributes:
        computed: tokens of rows that were completed, whether or not they counted.
        lost_tokens: tokens of rows that workers had begun when they ended.
        read_bytes: bytes of checkpoints that were read.
        given_s: when (s) rows were last given out.
    """

    def __init__(self, fleet: Fleet, tokens: Sequence[int], seed: int = 0):
        self._fleet, self._tokens, self._random = fleet, tokens, random.Random(seed)
        self._clock = 0.0
        self._events: list[tuple[float, int, Any, Any]] = []  # time, number, stream or worker, what is said
        self._number = 0
        self._ready: dict[Told, None] = {}
        self._loading: dict[VirtualWorker, None] = {}
        slow = round(fleet.slow_share * fleet.nodes)
        paces = [fleet.slow_factor] * slow + [1.0] * (fleet.nodes - slow)
        self._nodes = [Node(f"node{number}", f"node{number}", cpus=1) for number in range(fleet.nodes)]
        self._pace = {node.id: pace for node, pace in zip(self._nodes, paces, strict=True)}
        self.computed: int = 0
        self.lost_tokens = 0.0
        self.read_bytes = 0.0
        self.given_s = 0.0

    def now(self) -> float:
        return self._clock

    def nodes(self) -> list[Node]:
        return self._nodes

    def start(self, place: Place) -> VirtualWorker:
        worker = VirtualWorker(place, self._pace[place.node.id])
        if math.isfinite(self._fleet.mean_life_s):
            self._at(self._clock + self._random.expovariate(1 / self._fleet.mean_life_s), worker, None)
        return worker

    def call(self, worker: VirtualWorker, method: str, *arguments: Any) -> Told:
        stream = worker.stream = Told(worker)
        if worker.has_ended:
            self._say(stream, EndedError("it has ended"))
        elif method == "start":
            worker.left_bytes = float(self._fleet.checkpoint_bytes)
            self._loading[worker] = None
        else:
            self._run(stream, [number for number, _ in arguments[0]])
        return stream

    def wait(self, streams: Sequence[Told], timeout_s: float) -> list[Told]:
        until = self._clock + max(timeout_s, self._fleet.beat_s)
        while not self._ready and self._clock < until:
            self._advance(until)
        return [stream for stream in streams if stream in self._ready]

    def next(self, stream: Told) -> Any:
        item = stream.ready.popleft()
        if not stream.ready or item is END:
            del self._ready[stream]
        if item is END:
            stream.worker.stream = None
            raise StopIteration
        if isinstance(item, EndedError):
            raise item
        return item

    def kill(self, worker: VirtualWorker) -> None:
        self._end(worker)
        if worker.stream is not None:
            self._ready.pop(worker.stream, None)

    def _end(self, worker: VirtualWorker) -> None:
        """Ends a worker, with the rows that it had begun."""
        if worker.has_ended:
            return
        worker.has_ended = True
        self._loading.pop(worker, None)
        if worker.stream is not None:
            for begun, told, token_s in worker.stream.rows:
                if told > self._clock:
                    self.lost_tokens += max(0.0, self._clock - begun) / token_s

    def _run(self, stream: Told, rows: Sequence[int]) -> None:
        """Lets a worker complete rows in its slots; what it says of them comes with the next beat."""
        self.given_s = self._clock
        fleet, worker = self._fleet, stream.worker
        hangs = self._random.random() < fleet.hang_rate
        told = self._random.randrange(len(rows)) if hangs else len(rows)
        slots = [self._clock] * fleet.slots
        beats: dict[int, list[int]] = {}
        ended = self._clock
        for count, row in enumerate(rows):
            free = heapq.heappop(slots)
            done = free + self._tokens[row] * fleet.step_s * worker.pace
            heapq.heappush(slots, done)
            ended = max(ended, done)
            if count < told:
                beat = math.ceil(done / fleet.beat_s)
                beats.setdefault(beat, []).append(row)
                stream.rows.append((free, beat * fleet.beat_s, fleet.step_s * worker.pace))
        for beat, complete in beats.items():
            tokens = sum(self._tokens[row] for row in complete)
            lines = tuple((row, b"", False) for row in complete)
            self._at(beat * fleet.beat_s, stream, Beat(lines, tokens))
        if not hangs:
            last = math.ceil(ended / fleet.beat_s)
            for silent in range(math.floor(self._clock / fleet.beat_s) + 1, last):
                if silent not in beats:  # its steps go on: it says so
                    self._at(silent * fleet.beat_s, stream, Beat())
            self._at(last * fleet.beat_s, stream, END)

    def _at(self, time_s: float, of: Told | VirtualWorker, item: Any) -> None:
        self._number += 1
        heapq.heappush(self._events, (time_s, self._number, of, item))

    def _say(self, stream: Told, item: Any) -> None:
        stream.ready.append(item)
        self._ready[stream] = None

    def _advance(self, until: float) -> None:
        """Moves the clock to what happens next, if that is before `until`."""
        fleet = self._fleet
        rate = 0.0
        loaded = math.inf
        if self._loading:
            rate = min(fleet.node_bytes_per_s, fleet.storage_bytes_per_s / len(self._loading))
            loaded = self._clock + min(worker.left_bytes for worker in self._loading) / rate
        due = self._events[0][0] if self._events else math.inf
        before, self._clock = self._clock, min(until, due, loaded)
        for worker in list(self._loading):
            read = min(worker.left_bytes, rate * (self._clock - before))
            worker.left_bytes -= read
            self.read_bytes += read
            if loaded <= self._clock and worker.left_bytes <= 1e-6 * fleet.checkpoint_bytes:
                del self._loading[worker]
                assert worker.stream is not None
                self._say(worker.stream, Identity({}, "", 0))
                self._say(worker.stream, END)
        while self._events and self._events[0][0] <= self._clock:
            _, _, of, item = heapq.heappop(self._events)
            if isinstance(of, VirtualWorker):
                self._die(of)
            elif not of.worker.has_ended:
                self.computed += item.tokens if isinstance(item, Beat) else 0
                self._say(of, item)

    def _die(self, worker: VirtualWorker) -> None:
        if worker.has_ended:
            return
        self._end(worker)
        if worker.stream is not None:
            self._say(worker.stream, EndedError("it has ended"))


@dataclass(frozen=True)
class VirtualRow:
    """A row of a simulated job, of which nothing need be known."""

    where: str = "a row"


def simulate(
    fleet: Fleet,
    tokens: Sequence[int],
    shards: Sequence[tuple[int, ...]],
    *,
    timeout_s: float = 900.0,
    retries: int = 3,
    seed: int = 0,
) -> Outcome:
    """Returns what becomes of a job.

    Args:
        fleet: where it runs.
        tokens: tokens that each row takes.
        shards: numbers of the rows that are given out together.
        timeout_s, retries: as of `layerscope_jax.distributed.generate`.
        seed: of what happens by chance.

    Raises:
        LostWorkers: if the same rows lose too many workers.

    >>> fleet = Fleet(nodes=2, slots=1, step_s=1.0, beat_s=1.0)
    >>> simulate(fleet, [3, 2, 2], [(0,), (1,), (2,)]).makespan_s
    4.0
    """
    cluster = VirtualCluster(fleet, tokens, seed)
    first: list[float] = []

    def write(number: int, line: bytes, failed: bool) -> None:
        if not first:
            first.append(cluster.now())

    crew = Crew(cluster, workers=None, timeout_s=timeout_s, retries=retries, say=lambda text: None)
    with crew:
        rows = [VirtualRow()] * len(tokens)
        crew.work(shards, rows, Limits(1, fleet.slots), write)
    return Outcome(
        makespan_s=cluster.now(),
        ideal=ideal(fleet, tokens),
        lost=sum(worker.lost is not None for worker in crew.all),
        lost_tokens=cluster.lost_tokens + cluster.computed - sum(tokens),
        read_bytes=cluster.read_bytes,
        first_row_s=first[0],
        last_give_s=cluster.given_s,
    )


def ideal(fleet: Fleet, tokens: Sequence[int]) -> Ideal:
    """Returns what no job on a fleet can be faster than."""
    slow = round(fleet.slow_share * fleet.nodes)
    pace = (fleet.nodes - slow) + slow / fleet.slow_factor
    return Ideal(
        sum(tokens) * fleet.step_s / (fleet.slots * pace),
        fleet.load_s,
        max(tokens) * fleet.step_s * (1.0 if slow < fleet.nodes else fleet.slow_factor),
    )
