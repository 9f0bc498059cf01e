"""What an engine takes: on the device the budget, dense weights, caches and rows; in RAM the experts once."""

import gc
from dataclasses import replace
from functools import lru_cache

import jax
import numpy as np
import pytest
from helpers import PROFILE, one_jit, random_model

from benchmarks.live_bytes import CountedCopies, live_bytes, watch
from layerscope_jax import Engine, OffloadConfig, Request
from layerscope_jax.offload.bank import device_sharding, host_sharding
from layerscope_jax.offload.host_experts import share_memory

pytestmark = pytest.mark.usefixtures("quick_compiles")

RNG = np.random.default_rng(7)
REQUESTS = [
    Request(prompt=RNG.integers(0, 64, size).tolist(), max_new_tokens=count, stop_token_ids=())
    for size, count in zip((20, 17, 5, 12, 24, 3, 18), (5, 2, 3, 4, 2, 3, 2), strict=True)
]
"""More than there are slots, and of different lengths: newcomers are prefilled while others hold theirs."""


@lru_cache
def model():
    """Experts are 98% of it, as in the models that the library is for: 5% are less than one layer's."""
    return random_model(
        hidden_size=128, moe_intermediate_size=384, num_layers=3, num_experts=12, vocab_size=64
    )


@pytest.fixture(scope="module", autouse=True)
def freed():
    yield
    model.cache_clear()
    compiled.cache_clear()


def watched(config, hold=lambda: None, whole=False):
    """What was taken, beside what `hold` gives; and the statistics of the run in which it was counted."""
    stats = []

    def call(engine):
        held = hold()
        stats.append(engine.generate(REQUESTS).stats)
        if not whole:
            engine.runner.transfers.rest()
            link = engine.runner.transfers.stats  # with what was still on its way
            stats[-1] = replace(stats[-1], bytes_moved=link.demand_bytes + link.prefetch_bytes)
        return held

    with one_jit(whole):
        compiled(config)
        return watch(model(), config, call), stats[0]


@lru_cache
def compiled(config):
    """Has an engine do what will be counted: what is allocated to compile would be counted too."""
    with Engine(model(), config) as engine:
        engine.generate(REQUESTS)


def config(policy, eighths, **settings):
    budget = model().bank.total_bytes * eighths // 8
    return OffloadConfig(device_budget=budget, policy=policy, profile=PROFILE, max_num_seqs=4, **settings)


MOVING = [
    ("lru", 3, {}),
    ("presched", 1, {"predictor": "gate"}),
]


@pytest.mark.parametrize(("policy", "eighths", "settings"), MOVING)
def test_the_device_holds_what_was_named_and_ram_the_experts_once(policy, eighths, settings):
    taken, stats = watched(config(policy, eighths, **settings))
    budget, each = taken.named["experts"], model().bank.expert_bytes
    assert taken.moved == stats.bytes_moved > budget  # much of it had to leave again
    assert budget / 2 - each < taken.experts <= budget
    assert taken.joined >= 2
    assert taken.named["newcomers"] > 0
    assert taken.counted >= 3 * (taken.joined + 4)  # at every layer of every step
    for phase in ("prefill", "decode"):
        assert taken.experts / 2 + taken.named["dense"] < taken.device[phase] <= taken.limit(phase)
    assert taken.bank <= taken.ram <= taken.ram_limit


def test_nothing_on_the_device_but_what_is_dense():
    """In a process that has run something else before: what others hold does not count."""
    others = on_device(np.ones(10_000_000, np.uint8))
    taken, _ = watched(config("host-only", 0))
    assert taken.moved == taken.experts == taken.named["experts"] == 0
    assert taken.named["dense"] < taken.device["prefill"] <= taken.limit("prefill") < others.nbytes
    assert taken.bank <= taken.ram <= taken.ram_limit


def test_with_everything_resident_one_cpu_copies_nothing():
    """Experts stay in the bank, and the device has no bytes of them."""
    taken, stats = watched(OffloadConfig(max_num_seqs=4))
    assert stats.policy == "resident"
    assert taken.moved == taken.named["experts"] == 0
    assert taken.named["dense"] < taken.device["prefill"] <= taken.limit("prefill")
    assert taken.bank <= taken.ram <= taken.ram_limit
    with Engine(model()) as engine:
        bank = model().bank
        for expert in bank:
            (resident,) = engine.runner.residency.use(expert.layer, [expert.expert])
            assert share_memory(resident.arrays, bank[expert])


def test_in_one_jit_the_device_holds_the_experts_once_more():
    taken, stats = watched(OffloadConfig(numerics="fast", max_num_seqs=4), whole=True)
    assert stats.mode == "whole"
    for phase in ("prefill", "decode"):
        assert taken.bank + taken.named["dense"] < taken.device[phase] <= taken.limit(phase)
    assert taken.host == taken.bank


def copied(sharding):
    """A second copy of all experts."""
    return jax.block_until_ready(jax.device_put(on_device(model().bank.layers), sharding))


def on_device(experts):
    return jax.device_put(experts, device_sharding())


SECOND_IN_RAM = {
    "pinned": lambda: copied(host_sharding()),
    "NumPy's": lambda: [np.array(view) for expert in model().bank for view in model().bank.views(expert)],
}


@pytest.mark.parametrize("kind", SECOND_IN_RAM)
def test_a_second_copy_in_ram_is_found(kind):
    taken, _ = watched(config("host-only", 0), SECOND_IN_RAM[kind])
    assert taken.ram > 1.95 * taken.bank > taken.ram_limit
    assert taken.device["prefill"] <= taken.limit("prefill")


def test_one_layer_too_much_on_the_device_is_found():
    taken, _ = watched(config("lru", 3), lambda: on_device(model().bank.layers[0]))
    for phase in ("prefill", "decode"):
        assert taken.device[phase] > taken.limit(phase)


def test_memory_that_is_shared_counts_once():
    device = jax.devices()[0]
    gc.collect()  # what earlier tests left in cycles would go while this one counts
    before = live_bytes(device)
    pinned = jax.block_until_ready(jax.device_put(np.ones((64, 64), np.float32), host_sharding()))
    after = live_bytes(device)
    assert np.subtract(after, before).tolist() == [0, pinned.nbytes]
    shared = jax.device_put(np.asarray(pinned.addressable_data(0)), device)
    assert shared.unsafe_buffer_pointer() == pinned.unsafe_buffer_pointer()
    assert live_bytes(device) == after
    other = jax.block_until_ready(jax.device_put(pinned, device_sharding(device)))
    assert np.subtract(live_bytes(device), before).tolist() == [other.nbytes, pinned.nbytes]
    del other
    assert live_bytes(device) == after


def test_copies_are_counted_while_they_live():
    copies = CountedCopies()
    source = jax.device_put(np.ones(100, np.float32), host_sharding())
    held = [copies(source, device_sharding()) for _ in range(3)]
    assert (copies.moved, copies.alive) == (1200, 1200)
    del held[0]
    assert (copies.moved, copies.alive) == (1200, 800)
