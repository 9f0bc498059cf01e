"""Places for engines on the nodes of a cluster: one on each accelerator, or one on each node without any."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Node:
    """A machine of a cluster that is alive.

    Attributes:
        id: Ray's name of it.
        name: the name by which people know it.
        cpus, gpus: how many Ray may use there.
        names: all its names: Ray's, of the host, and its address.
    """

    id: str
    name: str
    cpus: float
    gpus: float = 0
    names: tuple[str, ...] = ()


class Place(NamedTuple):
    """Where an engine runs.

    Attributes:
        node: on this machine.
        number: which of the engines there it is, from 0.
        of: how many engines the machine has room for.
    """

    node: Node
    number: int
    of: int


def engines_per_node(nodes: Sequence[Node], workers: int | None) -> int:
    """Returns how many engines a node without accelerators has room for.

    One, unless `workers` are more than all nodes and accelerators: then such nodes have several, whose
    engines share the cores, for trying things on one machine.

    >>> engines_per_node([Node("a", "a", cpus=8), Node("b", "b", cpus=8, gpus=2)], 5)
    3
    """
    plain = sum(not int(node.gpus) for node in nodes)
    missing = (workers or 0) - sum(int(node.gpus) or 1 for node in nodes)
    return 1 + (-(-missing // plain) if plain and missing > 0 else 0)


def places(nodes: Sequence[Node], per_node: int) -> list[Place]:
    """Returns all places for engines: the first of each node, then the second of each, and so on.

    >>> nodes = [Node("a", "a", cpus=8), Node("b", "b", cpus=8, gpus=2)]
    >>> [f"{place.node.name}{place.number}" for place in places(nodes, 1)]
    ['a0', 'b0', 'b1']
    """
    room = {node.id: int(node.gpus) or per_node for node in nodes}
    return [
        Place(node, number, room[node.id])
        for number in range(max(room.values(), default=0))
        for node in nodes
        if number < room[node.id]
    ]


def free_places(
    nodes: Sequence[Node],
    per_node: int,
    workers: int | None,
    taken: Collection[tuple[str, int]],
    avoided: Collection[str],
) -> list[Place]:
    """Returns the places where another engine may start.

    The nodes that are left when one is gone get no more engines than before: their memory is spoken for.

    Args:
        nodes: nodes that are alive.
        per_node: from `engines_per_node`, of the nodes that were alive when the job began.
        workers: engines at most; None for as many as there are places.
        taken: node id and number of the places that have an engine.
        avoided: ids of nodes on which no engine starts.

    >>> free_places([Node("a", "a", cpus=8)], 2, 2, {("a", 0), ("gone", 0)}, ())[0].number
    1
    """
    spots = places([node for node in nodes if node.id not in avoided], per_node)
    free = [place for place in spots if (place.node.id, place.number) not in taken]
    busy = len(spots) - len(free)
    return free if workers is None else free[: max(0, workers - busy)]
