"""A cluster whose workers run in this process, one step at a time: real engines without Ray."""

from contextlib import contextmanager
from typing import Any

from layerscope_jax.distributed import job as jobs
from layerscope_jax.distributed.cluster import EndedError
from layerscope_jax.distributed.placing import Node


class InProcess:
    """Nodes a, b, ... of which each has one worker.

    Args:
        job: what workers are told.
        kind: class of the workers.
        count: number of nodes.
        ends: name of a node -> after how many things that it said its first worker ends.
    """

    def __init__(self, job: Any, kind: type, count: int = 2, ends: dict[str, int] | None = None):
        self.job, self.kind, self.ends = job, kind, dict(ends or {})
        self._nodes = [Node(letter, letter, cpus=1, names=(letter,)) for letter in "abcdefgh"[:count]]
        self._clock = 0.0

    def now(self):
        return self._clock

    def nodes(self):
        return self._nodes

    def start(self, place):
        return self.kind(self.job, place), place.node.name, [self.ends.pop(place.node.name, 10**9)]

    def call(self, worker, method, *arguments):
        return Stream(getattr(worker[0], method)(*arguments), worker)

    def wait(self, streams, timeout_s):
        self._clock += 1.0 if streams else timeout_s
        return list(streams)

    def next(self, stream):
        left = stream.worker[2]
        left[0] -= 1
        if left[0] < 0:
            raise EndedError("its process was killed")
        return next(stream.said)

    def kill(self, worker):
        engine = getattr(worker[0], "_engine", None)
        if engine is not None:
            engine.close()


class Stream:
    def __init__(self, said, worker):
        self.said, self.worker = said, worker


def use(monkeypatch, **options):
    """Lets jobs run on a cluster in this process."""

    @contextmanager
    def connected(address):
        yield None

    monkeypatch.setattr(jobs, "connected", connected)
    monkeypatch.setattr(jobs, "RayCluster", lambda ray, job, kind: InProcess(job, kind, **options))
