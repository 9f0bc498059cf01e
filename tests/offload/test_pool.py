"""The pool of host memory: what is held stays, demand comes first, failures and interrupts leave it right."""

import dataclasses
import os
import threading
from functools import partial

import jax
import numpy as np
import pytest
from disk_models import on_disk
from helpers import bits, in_time
from hypothesis import given, settings
from hypothesis import strategies as st
from links import random_bank

from layerscope_jax import ExpertId
from layerscope_jax.offload import disk, pool
from layerscope_jax.offload.bank import device_sharding
from layerscope_jax.offload.pool import READERS, HostPool
from layerscope_jax.support.errors import ReadError

EXPERTS = list(random_bank())


@dataclasses.dataclass(frozen=True)
class Shell:
    bank: object
    device: object = None


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    return on_disk(Shell(random_bank()), tmp_path_factory.mktemp("experts")).bank


class Disk:
    """Stands between the pool and the system: sees each read begin, holds it, and fails it as it is told."""

    def __init__(self, bank, gated=False):
        self.by_place = {(p.file, p.start): (e, n) for e in bank for n, p in enumerate(bank.pieces(e))}
        self.permits = threading.Semaphore(0) if gated else None
        self.changed = threading.Condition()
        self.begun: list[ExpertId] = []
        self.failing: set[ExpertId] = set()
        self.read = disk.File.read

    def __call__(self, file, piece, memory, buffer):
        expert, number = self.by_place[piece.file, piece.start]
        if number == 0:
            with self.changed:
                self.begun.append(expert)
                self.changed.notify_all()
            if self.permits is not None:
                assert self.permits.acquire(timeout=60)
        if expert in self.failing:
            raise OSError(5, f"injected: {expert}")
        self.read(file, piece, memory, buffer)

    def until_begun(self, count):
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.begun) >= count, timeout=60)

    def allow(self, count):
        for _ in range(count):
            self.permits.release()


@pytest.fixture
def made(bank, monkeypatch):
    """Makes a pool over a disk that the test can hold; both are closed at the end."""
    pools = []

    def make(slots, gated=False, readers=READERS):
        watched = Disk(bank, gated)
        monkeypatch.setattr(disk.File, "read", lambda *arguments: watched(*arguments))
        monkeypatch.setattr(pool, "READERS", readers)
        pools.append((HostPool(bank, slots, jax.devices()[0]), watched))
        return pools[-1]

    yield make
    for each, watched in pools:
        if watched.permits is not None:
            watched.allow(1000)
        in_time(each.close)


def is_right(host_pool, experts):
    for expert in experts:
        slot = host_pool.slot(expert)
        for array, kept, theirs in zip(
            slot.arrays, slot.in_memory.arrays, random_bank()[expert], strict=True
        ):
            assert array.sharding.memory_kind == "pinned_host"
            np.testing.assert_array_equal(bits(kept), bits(theirs))
            copied = jax.device_put(array, device_sharding())
            assert copied.unsafe_buffer_pointer() != array.unsafe_buffer_pointer()
            np.testing.assert_array_equal(bits(copied), bits(theirs))
    return True


def all_of(host_pool, experts, holder="host"):
    """Uses experts as the host does: as they come, each let go at once."""
    host_pool.hold(holder, experts, urgent=True)
    left = list(experts)
    while left:
        ready = in_time(partial(host_pool.wait, left))
        assert is_right(host_pool, ready)
        host_pool.let_go(holder, ready)
        left = [expert for expert in left if expert not in ready]


@pytest.mark.parametrize("slots", [1, 3, 100])
def test_more_experts_than_slots_come_in_rounds(made, slots):
    host_pool, watched = made(slots)
    for _ in range(2):
        all_of(host_pool, EXPERTS)
    stats, size = host_pool.stats, host_pool.bank.expert_bytes
    assert stats.hits + stats.misses == 2 * len(EXPERTS)
    assert stats.demand_bytes == size * len(watched.begun)
    assert len(host_pool._made) == min(slots, len(EXPERTS))
    if slots == 100:
        assert len(watched.begun) == len(EXPERTS)


@given(data=st.data())
@settings(deadline=None, max_examples=10)
def test_any_sequence_of_calls_keeps_what_is_held_and_reads_what_is_asked(bank, data):
    slots = data.draw(st.integers(1, 6))
    experts = st.lists(st.sampled_from(EXPERTS), unique=True, max_size=8)
    host_pool = HostPool(bank, slots, jax.devices()[0])
    try:
        for _ in range(data.draw(st.integers(1, 6))):
            host_pool.read_ahead(data.draw(experts))
            if data.draw(st.booleans()):
                host_pool.settle()
            some = data.draw(experts)
            host_pool.hold("link", some[:slots], urgent=False)
            for expert in some[:slots]:  # as the link does: in any order, each as soon as it is there
                in_time(partial(host_pool.wait, [expert]))
                assert is_right(host_pool, [expert])
                host_pool.let_go("link", [expert])
            all_of(host_pool, data.draw(experts))
            assert len(host_pool._where) <= slots
            assert len(host_pool._made) <= slots
    finally:
        host_pool.close()


def test_demand_is_read_before_what_is_only_expected(made):
    host_pool, watched = made(8, gated=True, readers=2)
    host_pool.read_ahead(EXPERTS[:4])
    watched.until_begun(1)  # one reader is left for demand
    host_pool.hold("link", EXPERTS[6:7], urgent=False)
    host_pool.hold("host", EXPERTS[4:6], urgent=True)
    watched.allow(8)
    in_time(partial(host_pool.wait, EXPERTS[5:6]))
    in_time(partial(host_pool.wait, EXPERTS[6:7]))
    assert set(watched.begun[:2]) <= {EXPERTS[0], EXPERTS[6], EXPERTS[4]}
    demanded, ahead = watched.begun.index(EXPERTS[5]), watched.begun.index
    assert all(demanded < ahead(expert) for expert in EXPERTS[1:4] if expert in watched.begun)


def test_a_held_expert_stays_and_what_is_expected_does_not_push_out_what_is_expected(made):
    host_pool, watched = made(3)
    all_of(host_pool, EXPERTS[:1])
    host_pool.hold("host", EXPERTS[:1], urgent=True)
    host_pool.read_ahead(EXPERTS[1:6])
    in_time(lambda: until(host_pool, lambda: all(map(host_pool.is_ready, EXPERTS[1:3]))))
    all_of(host_pool, EXPERTS[1:2])
    assert watched.begun == EXPERTS[:3]  # the other three would take the place of the first two
    assert is_right(host_pool, EXPERTS[:3])
    assert host_pool.stats.useful == 1
    host_pool.let_go("host")
    host_pool.read_ahead([])
    all_of(host_pool, EXPERTS[6:8])
    assert host_pool.stats.wasted == 1


def until(host_pool, holds):
    with host_pool._changed:
        assert host_pool._changed.wait_for(holds, timeout=60)


def test_an_expert_used_often_stays_longer_than_one_used_last(made):
    host_pool, _ = made(2)
    for _ in range(3):
        all_of(host_pool, EXPERTS[:1])
    all_of(host_pool, EXPERTS[1:2])
    all_of(host_pool, EXPERTS[2:3])
    assert host_pool.is_ready(EXPERTS[0])
    assert not host_pool.is_ready(EXPERTS[1])


def test_a_failed_read_names_the_file_and_the_next_one_is_right(made):
    host_pool, watched = made(2)
    told = []
    host_pool.told = lambda expert, error: told.append((expert, error))
    watched.failing = {EXPERTS[1]}
    host_pool.hold("host", EXPERTS[:2], urgent=True)
    in_time(partial(host_pool.wait, EXPERTS[:1]))
    with pytest.raises(ReadError, match=r"injected: .*expert=1"):
        in_time(partial(host_pool.wait, EXPERTS[1:2]))
    host_pool.settle()
    assert host_pool.stats.failed == 1
    assert sorted(expert for expert, _ in told) == EXPERTS[:2]
    watched.failing = set()
    all_of(host_pool, EXPERTS[:4])


def test_a_real_failure_of_the_system_names_the_file(bank, monkeypatch):
    def broken(number, memories, offset):
        raise OSError(5, os.strerror(5))

    host_pool = HostPool(bank, 2, jax.devices()[0])
    try:
        with monkeypatch.context() as patch:
            patch.setattr(disk, "preadv", broken)
            host_pool.hold("host", EXPERTS[:1], urgent=True)
            with pytest.raises(
                ReadError, match=r"experts_\d\.bin: Input/output error .* load the model again"
            ):
                in_time(partial(host_pool.wait, EXPERTS[:1]))
        host_pool.settle()
        all_of(host_pool, EXPERTS[:3])
    finally:
        host_pool.close()


def test_a_disk_that_does_not_answer_is_not_waited_for_forever(made, monkeypatch):
    host_pool, watched = made(2, gated=True)
    monkeypatch.setattr(pool, "STANDSTILL_S", 0.2)
    monkeypatch.setattr(pool, "GRACE_S", 0.2)
    host_pool.hold("host", EXPERTS[:1], urgent=True)
    with pytest.raises(ReadError, match=r"experts_\d\.bin: no read has ended for 0.2 s"):
        in_time(partial(host_pool.wait, EXPERTS[:1]))
    in_time(host_pool.settle)  # the read goes on
    monkeypatch.setattr(pool, "STANDSTILL_S", 60.0)
    watched.allow(100)
    all_of(host_pool, EXPERTS[:3])


def test_settling_ends_what_was_queued_and_waits_for_what_has_begun(made, monkeypatch):
    host_pool, watched = made(4, gated=True, readers=2)
    host_pool.hold("host", EXPERTS[:4], urgent=True)
    host_pool.read_ahead(EXPERTS[4:8])
    watched.until_begun(2)
    wait = host_pool._changed.wait

    def allow_then_wait(left=None):  # a read that ends while others are queued is followed by one of them
        watched.allow(2)
        return wait(left)

    monkeypatch.setattr(host_pool._changed, "wait", allow_then_wait)
    in_time(host_pool.settle)
    assert host_pool._reading == 0
    assert len(watched.begun) == 2
    watched.allow(100)
    all_of(host_pool, EXPERTS)


def test_a_closed_pool_says_so_and_ends_its_threads(made):
    host_pool, _ = made(2)
    all_of(host_pool, EXPERTS[:1])
    in_time(host_pool.close)
    assert not any(thread.is_alive() for thread in host_pool._threads)
    host_pool.hold("host", EXPERTS[3:4], urgent=True)
    with pytest.raises(ReadError, match="make a new Engine"):
        in_time(partial(host_pool.wait, EXPERTS[3:4]))
    in_time(host_pool.close)


def test_a_bug_in_a_reader_is_reported_to_who_waits(made, monkeypatch):
    host_pool, _ = made(1)
    monkeypatch.setattr(host_pool, "_slot_for", lambda expert: 1 / 0)
    host_pool.hold("host", EXPERTS[:1], urgent=True)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        in_time(partial(host_pool.wait, EXPERTS[:1]))
