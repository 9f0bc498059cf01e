"""NUMA: on a host of several nodes, which of them holds an expert, and which threads compute it.

A node's cores read its own memory faster than that of others, and only all nodes together have the bandwidth
that the host's experts need. So the experts of a layer are dealt out to the nodes, the threads too, and each
thread begins with the experts of its node. On a host of one node nothing is done, nor where Linux is silent.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from layerscope_jax.support.units import gib

SYSTEM = Path("/sys/devices/system/node")
MBIND = {"x86_64": 237, "aarch64": 235}
"""Number of the system call, which libc has no function for."""

PREFERRED, MOVE = 1, 2
"""Take a node's memory while there is some; move pages that are elsewhere."""

MOST_NODES = 1024

_own = threading.local()


@dataclass(frozen=True)
class Node:
    """Cores that are near to the same memory.

    Attributes:
        number: as Linux counts them.
        cpus: those that this process may use.
        total_bytes: of its memory; 0 if that is not known.
    """

    number: int
    cpus: frozenset[int]
    total_bytes: int = 0


@functools.cache
def nodes() -> tuple[Node, ...]:
    """Returns the nodes whose cores this process may use; none if there is only one."""
    found = read_nodes(SYSTEM, os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else ()
    return found if len(found) > 1 else ()


def read_nodes(system: Path, allowed: Iterable[int]) -> tuple[Node, ...]:
    """Returns the nodes that a folder of Linux describes and that have cores this process may use.

    Args:
        system: holds a folder for each node; a folder that cannot be read describes none.
        allowed: cores that this process may use.
    """
    allowed, found = set(allowed), []
    for folder in system.glob("node[0-9]*"):
        try:
            cpus = numbers((folder / "cpulist").read_text())
            memory = (folder / "meminfo").read_text()
        except (OSError, ValueError):
            continue
        if cpus & allowed:
            total = [line.split()[-2] for line in memory.splitlines() if "MemTotal" in line]
            size = 1024 * int(total[0]) if total and total[0].isdecimal() else 0
            found.append(Node(int(folder.name.removeprefix("node")), frozenset(cpus & allowed), size))
    return tuple(sorted(found, key=lambda node: node.number))


def numbers(text: str) -> set[int]:
    """Returns the numbers of a list as Linux writes it.

    >>> sorted(numbers("0-3,8,10-11"))
    [0, 1, 2, 3, 8, 10, 11]
    """
    result: set[int] = set()
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            result.update(range(int(first), int(last or first) + 1))
    return result


def home(expert: int) -> int:
    """Returns the place in `nodes` of the node that an expert of a layer belongs to."""
    return expert % len(nodes())


def by_node(experts: Sequence[int]) -> list[Any]:
    """Returns, to index arrays with, the places of experts in a list, node by node; all if there is one."""
    if not nodes():
        return [slice(None)]
    owners = np.array([home(expert) for expert in experts])
    return [np.flatnonzero(owners == node) for node in range(len(nodes()))]


def by_core() -> np.ndarray:
    """Returns, for compiled code, how many cores there are and each one's place in `nodes`: int64 [1 + C]."""
    found = nodes()
    count = 1 + max((cpu for node in found for cpu in node.cpus), default=-1)
    table = np.zeros(1 + count, np.int64)
    table[0] = count
    for place, node in enumerate(found):
        table[[1 + cpu for cpu in node.cpus]] = place
    return table


def own_first(count: int) -> list[int]:
    """Returns the order in which this thread computes the experts of `count` nodes: its own node's first."""
    first = getattr(_own, "node", 0) % count
    return [(first + step) % count for step in range(count)]


def join_node(number: int) -> None:
    """Keeps this thread, the n-th of those that compute, on the cores of one node, dealt out in turns."""
    if found := nodes():
        _own.node = number % len(found)
        os.sched_setaffinity(0, found[_own.node].cpus)


def keep_near(expert: int, arrays: Iterable[np.ndarray]) -> None:
    """Moves an expert's pages to the memory of its node, if the host has several.

    Pages that another expert shares, and pages that cannot be moved, stay where they are: it is only slower.
    """
    if found := nodes():
        for array in arrays:
            move(array.ctypes.data, array.nbytes, found[home(expert)].number)


def move(address: int, size: int, node: int) -> bool:
    """Moves the pages that lie within some memory to a node; whether the system has done so."""
    call, page = MBIND.get(platform.machine()), os.sysconf("SC_PAGE_SIZE")
    first, last = -(-address // page) * page, (address + size) // page * page
    if call is None or last <= first or not 0 <= node < MOST_NODES:
        return False
    mask = (ctypes.c_ulong * (MOST_NODES // (8 * ctypes.sizeof(ctypes.c_ulong))))()
    bits = 8 * ctypes.sizeof(ctypes.c_ulong)
    mask[node // bits] = 1 << node % bits
    libc = ctypes.CDLL(None, use_errno=True)
    given = (first, last - first, PREFERRED, ctypes.addressof(mask), MOST_NODES, MOVE)
    return libc.syscall(ctypes.c_long(call), *map(ctypes.c_ulong, given)) == 0


def plan(threads: int) -> str:
    """Returns where experts and threads go, in words; empty on a host of one node."""
    if not (found := nodes()):
        return ""
    shares = [len(range(place, threads, len(found))) for place in range(len(found))]
    parts = [
        f"node {node.number} ({gib(node.total_bytes)}): {share} of {threads} threads on cores "
        f"{ranges(node.cpus)}, experts {place}, {place + len(found)}, {place + 2 * len(found)}, ..."
        for place, (node, share) in enumerate(zip(found, shares, strict=True))
    ]
    return "; ".join(parts) + "; experts that are mapped from files or pinned lie where the system puts them"


def ranges(cpus: Iterable[int]) -> str:
    """Returns numbers as Linux lists them.

    >>> ranges({0, 1, 2, 8})
    '0-2,8'
    """
    parts: list[list[int]] = []
    for cpu in sorted(cpus):
        if parts and cpu == parts[-1][-1] + 1:
            parts[-1].append(cpu)
        else:
            parts.append([cpu])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
