"""A link that tests can watch, hold and break."""

from __future__ import annotations

import threading
from collections import Counter
from functools import lru_cache, partial

import jax
import numpy as np
from helpers import TINY, bits, in_time

from layerscope_jax import ExpertBank, ExpertId

NAMES = ("gate", "up", "down")
MATRICES = len(NAMES)
A, B, C, D = (ExpertId(layer, expert) for layer, expert in ((0, 0), (0, 5), (1, 5), (2, 7)))
CHUNK = 4 * TINY.hidden_size * TINY.moe_intermediate_size
EXPERT = MATRICES * CHUNK


@lru_cache
def random_bank():
    rng = np.random.default_rng(0)
    return ExpertBank.build(TINY, lambda expert, name, shape: rng.standard_normal(shape).astype(np.float32))


class Link:
    """Stands between `Transfers` and `jax.device_put`: sees every chunk begin, and decides how each ends.

    A chunk ends when the test has given a permit for it (with `gated`), and fails where `failing(expert,
    name, attempt)` says "start" or "end".
    """

    def __init__(self, bank, gated=False, failing=lambda expert, name, attempt: None):
        self.names = {id(m): (e, n) for e in bank for n, m in zip(NAMES, bank[e], strict=True)}
        self.permits = threading.Semaphore(0) if gated else None
        self.failing = failing
        self.changed = threading.Condition()
        self.begun: list[tuple[ExpertId, str]] = []
        self.beside: list[int] = []  # how many chunks were on the link when each began
        self.ended = 0
        self.moved = 0  # bytes
        self.attempts: Counter = Counter()

    def __call__(self, array, sharding):
        assert sharding.memory_kind == "device"
        expert, name = self.names[id(array)]
        with self.changed:
            self.attempts[expert, name] += 1
            self.beside.append(len(self.begun) - self.ended)
            self.begun.append((expert, name))
            self.changed.notify_all()
        how = self.failing(expert, name, self.attempts[expert, name])
        if how == "start":
            self._end(0)
            raise OSError(f"injected: {expert} {name} did not start")
        return Chunk(self, jax.device_put(array, sharding), how == "end")

    def _end(self, size):
        with self.changed:
            self.ended += 1
            self.moved += size

    def until_begun(self, count):
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.begun) >= count, timeout=60)

    def allow(self, count):
        for _ in range(count):
            self.permits.release()

    @property
    def order(self):
        """Experts in the order in which their chunks began, repeats in a row left out."""
        return [e for i, (e, _) in enumerate(self.begun) if i == 0 or self.begun[i - 1][0] != e]


class Chunk:
    def __init__(self, link, array, fails):
        self.link, self.array, self.fails = link, array, fails

    def block_until_ready(self):
        if self.link.permits is not None:
            assert self.link.permits.acquire(timeout=60)
        self.link._end(0 if self.fails else self.array.nbytes)
        if self.fails:
            raise OSError("injected: broke off")
        return self.array.block_until_ready()


def collect(transfers, wanted, arrived=None, lost=None):
    """Waits for all of `wanted`; gives and enters what has arrived until then, enters what was lost."""
    arrived = {} if arrived is None else arrived
    while missing := [expert for expert in wanted if expert not in arrived]:
        in_time(partial(transfers.wait, missing))
        came, failed = transfers.arrivals()
        arrived |= came
        if lost is not None:
            lost += failed
    return arrived


def right(bank, arrived):
    for expert, weights in arrived.items():
        for found, wanted in zip(weights, bank[expert], strict=True):
            np.testing.assert_array_equal(bits(found), bits(wanted))
    return True
