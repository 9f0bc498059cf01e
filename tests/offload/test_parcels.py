"""Experts as parcels: the same bytes, and one copy an expert."""

import gc
import weakref
from dataclasses import replace

import jax
import numpy as np
import pytest
from helpers import PROFILE, TINY, copying_by, random_model

from layerscope_jax import Engine, ExpertId, OffloadConfig
from layerscope_jax.models.experts import ExpertBody
from layerscope_jax.offload import bank as banks
from layerscope_jax.offload.bank import ExpertBank
from layerscope_jax.offload.parcels import memory_of, unpacked
from layerscope_jax.offload.slotted import SlottedExperts
from layerscope_jax.runtime import device_side

pytestmark = pytest.mark.usefixtures("quick_compiles")

PROMPTS = [[1, 2, 3], list(range(16))]
FORMATS = ["float32", "bfloat16", "int8", "int4", "mxfp4", "fp8"]


@pytest.fixture(scope="module")
def model():
    return random_model(seed=12, moe_intermediate_size=32)  # whole groups of formats


def in_format(model, name):
    return model if name == "float32" else model.with_format(name)


def in_parcels(model):
    return replace(model, bank=model.bank.in_parcels())


@pytest.mark.parametrize("name", FORMATS)
def test_a_parcel_holds_the_arrays_and_gives_them_back(model, name):
    bank = in_format(model, name).bank
    whole = bank.in_parcels()
    expert = ExpertId(1, 3)
    assert whole.arrays_per_expert == 1 < bank.arrays_per_expert
    parcel = whole.parcel(expert)
    assert parcel.sharding.memory_kind == "pinned_host"
    begin = parcel.unsafe_buffer_pointer()
    stacked = tuple(jax.numpy.asarray(view)[None] for view in bank.views(expert))
    back = unpacked(jax.device_put(parcel, banks.device_sharding()), stacked)
    for view, array, other in zip(whole.views(expert), back, bank.views(expert), strict=True):
        assert begin <= view.ctypes.data < begin + parcel.nbytes
        assert view.ctypes.data % 64 == 0
        np.testing.assert_array_equal(view, other)
        np.testing.assert_array_equal(array, other)
    assert whole.expert_bytes == bank.expert_bytes


def test_what_the_host_reads_cannot_be_written(model):
    view = model.bank.in_parcels().views(ExpertId(0, 0))[0]
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1


@pytest.mark.parametrize("name", ["float32", "int4"])
@pytest.mark.parametrize("policy", ["lru", "fiddler", "presched"])
def test_an_engine_copies_each_expert_once(model, name, policy, monkeypatch):
    monkeypatch.setattr(device_side, "device_experts", lambda device, cpu: SlottedExperts(device, cpu.format))
    same = in_format(model, name)
    config = OffloadConfig(device_budget=12 * same.bank.expert_bytes, policy=policy, profile=PROFILE)
    found, copies = [], []

    def copy(array, sharding):
        copies.append(array)
        return jax.device_put(array, sharding)

    for each in (same, in_parcels(same)):
        copies.clear()
        with copying_by(copy), Engine(each, config) as engine:
            result = engine.generate(PROMPTS, max_new_tokens=8, record_plans=True)
            engine.runner.transfers.rest()
            found.append(result)
            number = each.bank.arrays_per_expert
            assert len(copies) % number == 0
            moved = sum(len(plan.load) + len(plan.prefetch) for plan in result.plans)
            assert len(copies) <= number * moved  # prefetches may be dropped
            for expert in list(engine.runner.residency.resident):
                (slot,) = engine.runner.residency.use(expert.layer, [expert.expert])
                for array, view in zip(
                    engine.runner.device_experts._pool, same.bank.views(expert), strict=True
                ):
                    np.testing.assert_array_equal(array[slot], view)
    assert found[0].token_ids == found[1].token_ids


def test_banks_for_accelerators_are_parcels(model, monkeypatch):
    """As all that is made on the way: other formats, parts, and experts with biases."""
    suits = banks.suits_parcels
    assert not suits(jax.devices()[0], 100)
    monkeypatch.setattr(banks, "suits_parcels", lambda device, size: size <= banks.MOST_BYTES)
    config = TINY
    made = ExpertBank.build(config, lambda expert, name, shape: np.full(shape, expert.expert, np.float32))
    assert made.parcels is not None
    assert made.arrays_per_expert == 1
    other = made.converted(in_format(model, "int8").bank.format)
    part = other.part(range(2, 4))
    for bank, expert in ((made, 3), (other, 3), (part, 1)):
        (value,) = {float(array.reshape(-1)[0]) for array in bank.unpacked(ExpertId(1, expert))}
        assert value == pytest.approx(3, rel=0.01)
        assert bank.parcel(ExpertId(1, expert)).dtype == np.uint8
    monkeypatch.setattr(banks, "MOST_BYTES", 10)
    assert ExpertBank.build(config, lambda e, n, shape: np.zeros(shape, np.float32)).parcels is None


def test_biases_are_in_the_parcel_too():
    model = random_model(expert_body=ExpertBody("clamped", bias=True), seed=2)
    whole = model.bank.in_parcels()
    for view, array in zip(whole.views(ExpertId(0, 1)), model.bank.views(ExpertId(0, 1)), strict=True):
        np.testing.assert_array_equal(view, array)


def test_memory_is_shared_and_kept_by_the_parcel():
    parcel = jax.block_until_ready(jax.device_put(np.arange(64, dtype=np.uint8), banks.host_sharding()))
    part, freed = memory_of(parcel)[8:16].view(np.int64), weakref.ref(parcel)
    del parcel
    gc.collect()
    assert freed() is not None  # by the view alone
    assert part.view(np.uint8).tolist() == list(range(8, 16))
    del part
    gc.collect()
    assert freed() is None
