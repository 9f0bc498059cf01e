"""One copy of every expert, in pinned host memory, never written."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, random_decoder, random_model

from layerscope_jax import ExpertBank, ExpertId, Model
from layerscope_jax.formats import format_named
from layerscope_jax.offload.bank import device_sharding, host_sharding
from layerscope_jax.offload.host_experts import HostExperts
from layerscope_jax.offload.memory import ALIGNED


@pytest.fixture(scope="module", params=[np.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def bank(request):
    return random_model(dtype=request.param).bank


def test_it_holds_the_decoders_experts():
    decoder = random_decoder(TINY)
    bank = Model.from_decoder(decoder).bank
    for expert in bank:
        stacks = decoder.experts[expert.layer].weights()
        for matrix, stacked in zip(bank[expert], stacks, strict=True):
            np.testing.assert_array_equal(matrix, stacked[expert.expert])


def test_build_asks_for_each_matrix_once_with_its_shape():
    asked = []

    def read(expert, name, shape):
        asked.append((expert, name))
        return np.full(shape, 100 * expert.layer + expert.expert, np.float32)

    bank = ExpertBank.build(TINY, read)
    assert len(asked) == len(set(asked)) == 3 * TINY.num_layers * TINY.num_experts
    assert list(bank) == [ExpertId(x, e) for x in range(TINY.num_layers) for e in range(TINY.num_experts)]
    for expert in bank:
        for name, shape in TINY.expert_shapes().items():
            matrix = getattr(bank[expert], name)
            assert matrix.shape == shape
            assert (np.asarray(matrix) == 100 * expert.layer + expert.expert).all()


def test_memory_kinds(bank):
    for expert in bank:
        assert {matrix.sharding.memory_kind for matrix in bank[expert]} == {"pinned_host"}
    stacked = bank.stacked(1)
    assert {matrix.sharding.memory_kind for matrix in stacked} == {"device"}
    for name in ("gate", "up", "down"):
        expected = np.stack(
            [np.asarray(getattr(bank[ExpertId(1, e)], name)) for e in range(bank.num_experts)]
        )
        np.testing.assert_array_equal(getattr(stacked, name), expected)
    assert host_sharding().memory_kind == "pinned_host"
    assert device_sharding().memory_kind == "device"


def test_bytes(bank):
    itemsize = bank.dtype.itemsize
    assert bank.expert_bytes == 3 * TINY.hidden_size * TINY.moe_intermediate_size * itemsize
    assert bank.expert_bytes == TINY.expert_bytes(itemsize)
    assert bank.total_bytes == bank.expert_bytes * TINY.num_layers * TINY.num_experts
    assert bank.num_experts == TINY.num_experts


def test_views_are_the_same_memory(bank):
    for expert in bank:
        for view, matrix in zip(bank.views(expert), bank[expert], strict=True):
            assert view.__array_interface__["data"][0] == matrix.unsafe_buffer_pointer()
            assert view.dtype == matrix.dtype


def test_the_host_computes_from_the_same_memory(bank):
    """One copy in RAM serves transfers and host compute."""
    host = HostExperts(bank, jax.devices("cpu")[-1], threads=2)
    try:
        for expert in bank:
            for there, matrix in zip(host.weights(expert).arrays, bank[expert], strict=True):
                assert there.unsafe_buffer_pointer() == matrix.unsafe_buffer_pointer()
    finally:
        host.close()


def test_nobody_writes_into_it(bank):
    for view in bank.views(ExpertId(0, 0)):
        assert not view.flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            view[0, 0] = 1
        with pytest.raises(ValueError, match="WRITEABLE"):
            view.flags.writeable = True
    with pytest.raises(AttributeError):
        bank.layers = ()


def test_packed_experts_lie_side_by_side_in_large_blocks():
    wide = dataclasses.replace(TINY, hidden_size=64, moe_intermediate_size=32)
    bank = ExpertBank.build(
        wide, lambda _, name, shape: np.ones(shape, np.float32), format=format_named("int4")
    )
    for some in (bank, bank.converted(format_named("int8"))):
        arrays = [array for expert in some for array in some.views(expert)]
        begins = sorted(array.ctypes.data for array in arrays)
        assert begins[-1] - begins[0] < some.total_bytes + ALIGNED * len(begins)
        assert not any(begin % ALIGNED for begin in begins)
