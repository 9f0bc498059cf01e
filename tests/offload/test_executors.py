"""An expert's rows have the same bits wherever it is computed, and whatever is computed with it."""

from dataclasses import dataclass, replace

import jax
import numpy as np
import pytest
from helpers import TINY, bits, in_time

from layerscope_jax import ExpertBank, ExpertId, ModelConfig
from layerscope_jax.kernels.cpu import CpuExperts
from layerscope_jax.kernels.grouping import Assignments
from layerscope_jax.kernels.host_kernels import LOOPS
from layerscope_jax.models.experts import ExpertBody, ExpertWeights
from layerscope_jax.offload.bank import device_sharding
from layerscope_jax.offload.executors import DeviceExperts, SharedExperts, aligned_zeros
from layerscope_jax.offload.host_experts import HostExperts

# XLA adds up products with 32 rows and with 64 rows in different orders here: a bucket too large would show.
WIDE = ModelConfig(
    **vars(TINY) | {"hidden_size": 512, "moe_intermediate_size": 256, "num_layers": 1, "num_experts": 18}
)
COUNTS = {0: 1, 1: 2, 2: 130, 3: 40, 4: 20, 5: 60, 6: 64, 7: 90, 8: 100}  # the others have one token each
CHOICES = 2
CPU = CpuExperts(2, LOOPS)


@pytest.fixture(scope="module")
def bank():
    """In float32, where rounding shows every change of order."""
    rng = np.random.default_rng(0)
    return ExpertBank.build(
        WIDE, lambda _, name, shape: (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)
    )


@pytest.fixture
def host(bank):
    host = HostExperts(bank, jax.devices("cpu")[-1], threads=2)
    yield host
    host.close()


def rows_and_inputs(bank):
    counts = {expert: COUNTS.get(expert, 1) for expert in range(WIDE.num_experts)}
    chosen = np.repeat(list(counts), list(counts.values()))
    chosen = np.append(chosen, [17] * (len(chosen) % CHOICES))
    np.random.default_rng(1).shuffle(chosen)
    rows = Assignments(chosen.reshape(-1, CHOICES).astype(np.int32))
    inputs = np.random.default_rng(2).standard_normal((len(chosen) // CHOICES, WIDE.hidden_size))
    return rows, jax.device_put(inputs.astype(bank.dtype), device_sharding())


def on_device(bank, inputs, rows, experts, device=None):
    """[T * K, D] with zeros where nothing was computed; and the executor."""
    device = device or SharedExperts(CPU)
    outputs = device.take(rows.total, WIDE.hidden_size, bank.dtype)
    held = {
        expert: device.keep(jax.device_put(bank[ExpertId(0, expert)], device_sharding()))
        for expert in experts
    }
    outputs, done = device.run(outputs, inputs, rows, experts, lambda some: [held[expert] for expert in some])
    assert done is None or np.isfinite(done).all()
    return np.asarray(outputs)[:-1], device


def on_host(bank, host, inputs, rows, experts):
    found = np.zeros((rows.total + 1, WIDE.hidden_size), bank.dtype)
    in_time(host.start(found, 0, inputs, rows, experts).result)
    device = DeviceExperts(jax.devices()[0])
    outputs = device.take(rows.total, WIDE.hidden_size, bank.dtype)
    outputs = np.asarray(device.place(outputs, found, rows, experts))[:-1]
    np.testing.assert_array_equal(bits(outputs), bits(found[:-1]))
    return outputs


def test_host_and_device_alone_and_together_give_the_same_bits(bank, host):
    rows, inputs = rows_and_inputs(bank)
    together, _ = on_device(bank, inputs, rows, range(WIDE.num_experts))
    assert np.abs(together).max(1).min() > 0  # every row was computed
    np.testing.assert_array_equal(
        bits(on_host(bank, host, inputs, rows, range(WIDE.num_experts))), bits(together)
    )
    for expert in range(10):
        slots = rows.slots(expert)
        expected = np.zeros_like(together)
        expected[slots] = together[slots]
        alone, _ = on_device(bank, inputs, rows, [expert])
        np.testing.assert_array_equal(bits(alone), bits(expected))
        np.testing.assert_array_equal(bits(on_host(bank, host, inputs, rows, [expert])), bits(expected))
    for part in ([4, 2, 0, 11, 12, 13], [17, 9, 8, 7, 6, 5, 3, 1]):
        expected = np.zeros_like(together)
        slots = np.concatenate([rows.slots(expert) for expert in part])
        expected[slots] = together[slots]
        np.testing.assert_array_equal(bits(on_device(bank, inputs, rows, part)[0]), bits(expected))
        np.testing.assert_array_equal(bits(on_host(bank, host, inputs, rows, part)), bits(expected))


def test_the_rows_are_the_networks(bank):
    rows, inputs = rows_and_inputs(bank)
    together, _ = on_device(bank, inputs, rows, range(WIDE.num_experts))
    x = np.asarray(inputs, np.float64)
    for expert in (0, 2, 8, 17):
        gate, up, down = (np.asarray(matrix, np.float64) for matrix in bank[ExpertId(0, expert)])
        token = rows.slots(expert) // CHOICES
        inner = (x[token] @ gate.T) / (1 + np.exp(-(x[token] @ gate.T))) * (x[token] @ up.T)
        np.testing.assert_allclose(together[rows.slots(expert)], inner @ down.T, rtol=1e-5, atol=1e-5)


def test_what_they_count(bank, host):
    rows, inputs = rows_and_inputs(bank)
    _, device = on_device(bank, inputs, rows, [0, 2, 9])
    assert (device.stats.experts, device.stats.tokens) == (3, 132)
    assert (device.stats.rows, device.stats.dispatches) == (132, 1)
    # On an accelerator 130 rows are a piece of 128 and one of 2, which shares a dispatch of 4 with 0 and 9.
    _, device = on_device(bank, inputs, rows, [0, 2, 9], DeviceExperts(jax.devices()[0]))
    assert (device.stats.experts, device.stats.tokens) == (4, 132)
    assert (device.stats.rows, device.stats.dispatches) == (128 + 4 * 2, 2)
    on_host(bank, host, inputs, rows, [0, 2, 9])
    assert host.stats.busy_s > 0
    assert (host.stats.tokens, host.stats.rows, host.stats.dispatches) == (132, 132, 1)


def test_a_failure_on_the_host_reaches_who_waits(bank, host):
    rows, inputs = rows_and_inputs(bank)
    found = np.zeros((rows.total + 1, WIDE.hidden_size), bank.dtype)
    future = host.start(found, 7, inputs, rows, [0])  # there is no layer 7
    with pytest.raises(IndexError):
        in_time(future.result)
    in_time(host.start(found, 0, inputs, rows, [0]).result)
    assert np.count_nonzero(found.any(1)) == 1


def test_a_closed_host_executor_says_so(bank):
    rows, inputs = rows_and_inputs(bank)
    host = HostExperts(bank, jax.devices("cpu")[-1], threads=2)
    host.close()
    with pytest.raises(ValueError, match="closed with its engine; make a new Engine"):
        host.start(np.zeros((rows.total + 1, WIDE.hidden_size), bank.dtype), 0, inputs, rows, [0])


def test_what_the_host_keeps_is_the_banks_own_memory(bank, host):
    """No second copy, neither among the executor's arrays nor beside the bank's."""
    rows, inputs = rows_and_inputs(bank)
    on_host(bank, host, inputs, rows, range(WIDE.num_experts))
    assert host._weights.keys() == set(bank)
    for expert, kept in host._weights.items():
        for there, matrix in zip(kept.arrays, bank[expert], strict=True):
            assert there.unsafe_buffer_pointer() == matrix.unsafe_buffer_pointer()
            assert matrix._npy_value is None


def test_copies_are_not_kept_where_the_host_does_not_share_the_banks_memory(bank):
    """As on a backend whose arrays NumPy can only copy."""

    @dataclass
    class Elsewhere:
        array: jax.Array

        shape = property(lambda self: self.array.shape)
        dtype = property(lambda self: self.array.dtype)

        def addressable_data(self, index):
            return np.array(self.array)

        def unsafe_buffer_pointer(self):
            return self.array.unsafe_buffer_pointer()

    layers = tuple(tuple(ExpertWeights(*map(Elsewhere, expert)) for expert in layer) for layer in bank.layers)
    rows, inputs = rows_and_inputs(bank)
    elsewhere = HostExperts(ExpertBank(layers), jax.devices("cpu")[-1], threads=2)
    try:
        found = on_host(bank, elsewhere, inputs, rows, [0, 2, 9])
    finally:
        elsewhere.close()
    assert not elsewhere._weights
    np.testing.assert_array_equal(bits(found), bits(on_device(bank, inputs, rows, [0, 2, 9])[0]))


def test_jax_reads_the_shared_rows_where_they_are():
    rows = aligned_zeros((3, 5), np.float32)
    there = jax.device_put(rows, jax.devices("cpu")[0])
    assert there.unsafe_buffer_pointer() == rows.ctypes.data


def test_experts_with_biases_are_their_reference_on_either():
    body, rng = ExpertBody("clamped", bias=True, limit=0.7), np.random.default_rng(0)
    config = replace(TINY, num_layers=1, num_experts=3, expert_body=body)
    bank = ExpertBank.build(config, lambda _, name, shape: rng.standard_normal(shape).astype(np.float32) / 5)
    rows, inputs = Assignments(np.array([[0, 1], [1, 0], [0, 2]], np.int32)), rng.standard_normal((3, 32))
    inputs = jax.device_put(inputs.astype(np.float32), device_sharding())
    device, host = DeviceExperts(jax.devices()[0], bank.format), HostExperts(bank, jax.devices("cpu")[-1], 1)
    held = [jax.device_put(bank[ExpertId(0, expert)], device_sharding()) for expert in range(3)]
    outputs = device.take(6, 32, bank.dtype)
    outputs, _ = device.run(outputs, inputs, rows, range(3), lambda some: [held[one] for one in some])
    computed = np.zeros((7, 32), np.float32)
    host.compute(computed, 0, inputs, rows, range(3))
    assert sum(host.stats.by_kernel.values()) == 3
    host.close()
    reference = jax.jit(bank.format.ffn)
    for expert in range(3):
        slots = rows.slots(expert)
        expected = reference(inputs, held[expert])[slots // 2]
        for result in (np.asarray(outputs), computed):
            np.testing.assert_allclose(result[slots], expected, rtol=0, atol=2e-6)
