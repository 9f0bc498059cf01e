"""A cluster of Ray: the way to it, the nodes that it has, and workers as actors on them."""

from __future__ import annotations

import logging
import re
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any, Protocol

from layerscope_jax.distributed.placing import Node, Place
from layerscope_jax.distributed.worker import Job, Worker

LOCAL = "local"
"""Address that stands for a cluster of this machine alone, which ends with the job."""


class EndedError(Exception):
    """Raised when a worker has ended; its text says how."""


class Cluster(Protocol):
    """What a crew needs of a cluster: Ray's, or one on a virtual clock."""

    def now(self) -> float:
        """Returns the time (s)."""

    def nodes(self) -> list[Node]:
        """Returns the nodes that are alive."""

    def start(self, place: Place) -> Any:
        """Starts a worker in a place and returns it, before it is there."""

    def call(self, worker: Any, method: str, *arguments: Any) -> Any:
        """Calls a worker's method, and returns at once the stream of what it will say."""

    def wait(self, streams: Sequence[Any], timeout_s: float) -> list[Any]:
        """Returns the streams that have something to say, or have ended; waits for the first of them."""

    def next(self, stream: Any) -> Any:
        """Returns what a stream says next.

        Raises:
            StopIteration: if it is at its end.
            EndedError: if its worker has ended before.
        """

    def kill(self, worker: Any) -> None:
        """Ends a worker, whatever it is doing."""


def ray_itself() -> ModuleType:
    """Returns the package Ray.

    Raises:
        ValueError: if it is not installed.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ValueError(
            "many servers need Ray, which is not installed: pip install 'layerscope-jax[ray]' on each of them"
        ) from None
    return ray


@contextmanager
def connected(address: str | None) -> Iterator[ModuleType]:
    """Gives Ray, connected to a cluster within the `with` block.

    A process that is connected already stays so, and its cluster is the one that is used.

    Args:
        address: "local", "auto" for the cluster that this machine is part of, or "host:port" of its head;
            None for "local".

    Raises:
        ValueError: if Ray is not installed, or no cluster answers.
    """
    ray = ray_itself()
    address = LOCAL if address is None else address
    if address.startswith("ray://"):
        raise ValueError(
            f"{address}: expected the address of a cluster that this machine is part of, such as auto; start "
            "the command on a node of the cluster, for example by `ray job submit`"
        )
    if ray.is_initialized():
        yield ray
        return
    try:
        with warnings.catch_warnings():
            # JAX warns of any fork; Ray's are followed at once by another program.
            warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
            if address == LOCAL:
                ray.init(address=LOCAL, include_dashboard=False, logging_level=logging.ERROR)
            else:
                ray.init(address=address, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        what = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{address}: expected a cluster of Ray that answers, got {what}; start it by `ray start --head`, "
            "or give local for this machine alone"
        ) from None
    try:
        yield ray
    finally:
        ray.shutdown()


class RayCluster:
    """A cluster of Ray, with workers as actors that stream what they say.

    Args:
        ray: Ray, connected.
        job: what each worker is told.
        kind: class of the workers.
    """

    def __init__(self, ray: ModuleType, job: Job, kind: type = Worker):
        self._ray, self._kind = ray, ray.remote(kind)
        self._job = ray.put(job)  # once, whatever the predictor in it weighs

    now = staticmethod(time.monotonic)

    def nodes(self) -> list[Node]:
        """Returns the nodes that are alive, in the order of their names."""
        nodes = [node_of(record) for record in self._ray.nodes() if record["Alive"]]
        return sorted(nodes, key=lambda node: (node.name, node.id))

    def start(self, place: Place) -> Any:
        """Starts an actor on a place's node."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        return self._kind.options(
            # One core at most is claimed, to be seen to be there: how many are used is the engine's affair.
            num_cpus=min(1.0, place.node.cpus / place.of),
            num_gpus=1 if int(place.node.gpus) else 0,
            max_restarts=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(place.node.id, soft=False),
        ).remote(self._job, place)

    def call(self, worker: Any, method: str, *arguments: Any) -> Any:
        """Calls a method of an actor, which is a generator."""
        return getattr(worker, method).options(num_returns="streaming").remote(*arguments)

    def wait(self, streams: Sequence[Any], timeout_s: float) -> list[Any]:
        """Returns the streams that have something to say; all of them, once the first has."""
        if not streams:
            time.sleep(timeout_s)  # until there is a node
            return []
        ready, _ = self._ray.wait(list(streams), num_returns=1, timeout=timeout_s, fetch_local=False)
        if ready and len(streams) > 1:
            count = len(streams)
            ready, _ = self._ray.wait(list(streams), num_returns=count, timeout=0, fetch_local=False)
        return ready

    def next(self, stream: Any) -> Any:
        """Returns what an actor says next."""
        try:
            return self._ray.get(next(stream))
        except self._ray.exceptions.RayError as error:
            raise EndedError(told_by_ray(error)) from None

    def kill(self, worker: Any) -> None:
        """Ends an actor's process."""
        with suppress(self._ray.exceptions.RayError):
            self._ray.kill(worker)


def node_of(record: dict[str, Any]) -> Node:
    """Returns a node as Ray describes it.

    >>> node_of({"NodeID": "7f", "NodeManagerAddress": "10.0.0.2", "NodeName": "10.0.0.2",
    ...     "NodeManagerHostname": "rack7", "Resources": {"CPU": 8.0}}).name
    'rack7'
    """
    keys = ("NodeName", "NodeManagerHostname", "NodeManagerAddress")
    named, host, address = (record.get(key) or "" for key in keys)
    resources = record["Resources"]
    return Node(
        record["NodeID"],
        named if named not in ("", address) else host or address,
        resources.get("CPU", 0.0),
        resources.get("GPU", 0.0),
        tuple(name for name in (named, host, address) if name),
    )


def told_by_ray(error: Exception) -> str:
    r"""Returns what Ray says of a worker's end: its last words, or the last line of a traceback.

    >>> told_by_ray(Exception("The actor died.\n\tclass_name: Worker\nWorker exit detail: Killed by 9."))
    'Killed by 9.'
    """
    text = re.sub(r"\x1b\[\d+m", "", str(error)).strip()  # without colours
    _, detail, rest = text.partition("Worker exit detail: ")
    return " ".join((rest if detail else text.splitlines()[-1]).split())[:300]
