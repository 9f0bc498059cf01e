"""Our own loops: the network's rows, with the same bits in any company, block and thread."""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import bits
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from layerscope_jax.formats import format_named, plain_of
from layerscope_jax.kernels import amx, cpu, strips, vectors
from layerscope_jax.kernels.activations import clamped, gelu, gelu_tanh
from layerscope_jax.kernels.cpu import CpuExperts, InMemory, WorkStats
from layerscope_jax.kernels.grouping import Assignments
from layerscope_jax.kernels.host_kernels import AMX, LOOPS, PAIRS, kernel_of
from layerscope_jax.kernels.numbers import room, silu
from layerscope_jax.models.experts import SWIGLU, ExpertBody, weights_type

TYPES = {"float32": (np.float32, 2e-6), "bfloat16": (ml_dtypes.bfloat16, 1e-2)}


@pytest.fixture
def computers():
    """By threads and kernel."""
    made = {}

    def get(threads, kernel):
        key = threads, kernel.name
        if key not in made:
            made[key] = CpuExperts(threads, kernel)
        return made[key]

    yield get
    for one in made.values():
        one.close()


def experts(dtype, width, hidden, count, body=SWIGLU):
    rng = np.random.default_rng(0)

    def matrix(*shape):
        return jax.device_put((rng.standard_normal(shape) / np.sqrt(shape[1])).astype(dtype))

    def bias():
        return [jax.device_put(rng.standard_normal(2 * hidden + width).astype(dtype))] if body.bias else []

    return [
        weights_type(body)(matrix(hidden, width), matrix(hidden, width), matrix(width, hidden), *bias())
        for _ in range(count)
    ]


def rows_of(computer, inputs, tokens, weights, body=SWIGLU):
    """[T, D] of those `tokens` of one expert."""
    held = InMemory.of(weights, plain_of(weights).for_body(body))
    chosen = Assignments(np.zeros((len(inputs), 1), np.int32), np.isin(np.arange(len(inputs)), tokens))
    outputs = np.zeros((len(inputs) + 1, inputs.shape[1]), inputs.dtype)
    computer.compute(outputs, inputs, chosen, [0], lambda _: [held], WorkStats())
    others = np.delete(outputs[:-1], tokens, 0)
    assert not others.any()
    return outputs[tokens]


def network(inputs, weights):
    """The same rows in float64, rounded where the network rounds."""
    gate, up, down = (np.asarray(matrix, np.float64).T for matrix in weights)
    x = inputs.astype(np.float64)
    inner = (x @ gate) / (1 + np.exp(-(x @ gate))) * (x @ up)
    return inner.astype(inputs.dtype).astype(np.float64) @ down


# Sizes that are no multiples of what is added at once, less than that, more than are summed at once.
SHAPES = [(37, 29), (3, 5), (64, 96), (6, 4500), (40, 100), (597, 309), (608, 320)]
EVEN = [(32, 32), (96, 64), (64, 4128), (288, 544)]
COUNTS = (1, 2, 3, 4, 7, 8, 15, 16, 29, 40, 64, 65, 130)

pairs_only = pytest.mark.skipif(
    not vectors.suit(np.dtype(ml_dtypes.bfloat16), 32, 32), reason="this CPU has no AVX512_BF16"
)
amx_only = pytest.mark.skipif(not amx.available(), reason="this CPU has no AMX")
WAYS = [
    *[(name, LOOPS, shape) for name in TYPES for shape in SHAPES],
    *[pytest.param("bfloat16", PAIRS, shape, marks=pairs_only) for shape in EVEN],
]


@pytest.mark.parametrize(("name", "kernel", "shape"), WAYS)
def test_they_are_the_network(computers, name, kernel, shape):
    dtype, tolerance = TYPES[name]
    (weights,) = experts(dtype, *shape, 1)
    inputs = np.random.default_rng(1).standard_normal((130, shape[0])).astype(dtype)
    expected = network(inputs, weights)
    for count in COUNTS:
        found = rows_of(computers(1, kernel), inputs, np.arange(count), weights).astype(np.float64)
        error = np.abs(found - expected[:count]).max() / np.abs(expected).max()
        assert error < tolerance


BODIES = {
    "silu, biases": ExpertBody("silu", bias=True),
    "gelu": ExpertBody("gelu"),
    "gelu_tanh, biases": ExpertBody("gelu_tanh", bias=True),
    "clamped": ExpertBody("clamped", limit=0.7),
    "clamped, biases": ExpertBody("clamped", bias=True, limit=1.5),
}
PLACES = [  # with and without a rest, of several blocks, of several panels
    *[("float32", LOOPS, (37, 29)), ("bfloat16", LOOPS, (37, 29)), ("float32", LOOPS, (6, 4500))],
    *[("float32", LOOPS, (288, 544)), ("bfloat16", LOOPS, (288, 544))],
    pytest.param("bfloat16", PAIRS, (288, 544), marks=pairs_only),
    pytest.param("bfloat16", AMX, (288, 544), marks=amx_only),
]


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
@pytest.mark.parametrize(("name", "kernel", "shape"), PLACES)
def test_experts_of_any_body_are_the_reference_with_the_same_bits_in_any_company(
    computers, name, kernel, shape, body
):
    dtype, tolerance = TYPES[name]
    (weights,) = experts(dtype, *shape, 1, body)
    inputs = np.random.default_rng(1).standard_normal((70, shape[0])).astype(dtype)
    reference = format_named(name).for_body(body).ffn
    expected = np.asarray(jax.jit(reference)(jax.device_put(inputs), weights), np.float64)
    everything = rows_of(computers(1, kernel), inputs, np.arange(70), weights, body)
    error = np.abs(everything.astype(np.float64) - expected).max() / np.abs(expected).max()
    assert error < 2 * tolerance  # both round
    for some in (np.array([5]), np.array([1, 2, 69]), np.arange(7, 40)):
        found = rows_of(computers(2, kernel), inputs, some, weights, body)
        np.testing.assert_array_equal(bits(found), bits(everything[some]))


def test_every_body_has_a_kernel_but_an_activation_that_nobody_knows():
    for name in TYPES:
        for body in BODIES.values():
            kernel = kernel_of(format_named(name).for_body(body), np.dtype(name), 64, 96)
            assert kernel is kernel_of(format_named(name), np.dtype(name), 64, 96)
    unknown = ExpertBody("relu")  # a format of one's own may compute it
    assert kernel_of(format_named("float32").for_body(unknown), np.dtype("float32"), 64, 96) is None


@pytest.mark.parametrize(
    ("name", "kernel", "shape"),
    [
        ("float32", LOOPS, (302, 300)),
        ("bfloat16", LOOPS, (302, 300)),
        ("float32", LOOPS, (608, 320)),  # without a rest: many tokens go another way
        ("bfloat16", LOOPS, (608, 320)),
        pytest.param("bfloat16", PAIRS, (608, 320), marks=pairs_only),
    ],
)
def test_a_row_has_the_same_bits_in_any_company(computers, name, kernel, shape):
    dtype, _ = TYPES[name]
    (weights,) = experts(dtype, *shape, 1)
    inputs = np.random.default_rng(2).standard_normal((130, shape[0])).astype(dtype)
    alone = [rows_of(computers(1, kernel), inputs, np.array([t]), weights) for t in range(130)]
    for count in COUNTS:
        some = np.sort(np.random.default_rng(count).permutation(130)[:count])
        found = rows_of(computers(2, kernel), inputs, some, weights)
        np.testing.assert_array_equal(bits(found), bits(np.concatenate(alone)[some]))


@pytest.mark.parametrize(("name", "weights_name"), [("float32", "bfloat16"), ("bfloat16", "float32")])
@pytest.mark.parametrize("shape", [(37, 29), (96, 64)])
def test_weights_are_read_by_their_own_type(computers, name, weights_name, shape):
    """Whatever type the rows have: what the format's reference gives, with few tokens and with many."""
    (weights,) = experts(TYPES[weights_name][0], *shape, 1)
    inputs = np.random.default_rng(1).standard_normal((40, shape[0])).astype(TYPES[name][0])
    expected = format_named(weights_name).ffn(jax.device_put(inputs), weights)
    expected = np.asarray(expected, np.float32)
    for count in (1, 3, 40):
        found = rows_of(computers(1, LOOPS), inputs, np.arange(count), weights)
        assert found.dtype == inputs.dtype
        error = np.abs(found.astype(np.float32) - expected[:count]).max() / np.abs(expected).max()
        assert error < TYPES[name][1]


def test_experts_and_rows_that_a_kernel_cannot_read_are_refused(computers):
    plain, wide = experts(np.float32, 32, 32, 1)[0], np.ones((2, 32), np.float32)
    with pytest.raises(ValueError, match=r"'amx' cannot compute experts \[32, 32\] in the format 'float32'"):
        rows_of(computers(1, AMX), wide, np.arange(2), plain)
    with pytest.raises(ValueError, match=r"'loops' cannot compute .* with rows of float16"):
        rows_of(computers(1, LOOPS), wide.astype(np.float16), np.arange(2), plain)
    other = InMemory.of(experts(np.float32, 32, 64, 1)[0])
    rows = Assignments(np.array([[0, 1]], np.int32))
    with pytest.raises(ValueError, match="of one shape and format"):
        computers(1, LOOPS).compute(
            np.zeros((3, 32), np.float32),
            wide[:1],
            rows,
            [0, 1],
            lambda _: [InMemory.of(plain), other],
            WorkStats(),
        )


def test_tokens_are_shared_out_into_groups_that_are_compiled():
    for tokens in range(strips.MANY, 500):
        groups = -(-tokens // strips.TOKENS)
        sizes = {tokens * (n + 1) // groups - tokens * n // groups for n in range(groups)}
        assert sizes <= set(range(strips.FEWEST, strips.TOKENS + 1))


def test_the_kernel_that_suits():
    kinds = {"float32": {LOOPS}, "bfloat16": {LOOPS, PAIRS, AMX}, "float16": {None}}
    for name, possible in kinds.items():
        assert kernel_of(format_named(name), np.dtype(name), 64, 96) in possible
    bfloat16 = format_named("bfloat16")
    assert (
        kernel_of(bfloat16, np.dtype("bfloat16"), 64, 100) is LOOPS
    )  # neither pairs nor tiles without a rest
    assert (
        kernel_of(bfloat16, np.dtype("float32"), 64, 96) is LOOPS
    )  # which widens weights, whatever the rows


@amx_only
@pytest.mark.parametrize("shape", EVEN)
def test_matrix_instructions_are_the_network(computers, shape):
    assert kernel_of(format_named("bfloat16"), np.dtype(ml_dtypes.bfloat16), *shape) is AMX
    (weights,) = experts(ml_dtypes.bfloat16, *shape, 1)
    inputs = np.random.default_rng(1).standard_normal((300, shape[0])).astype(ml_dtypes.bfloat16)
    expected = network(inputs, weights)
    for count in (1, 2, 15, 16, 17, 33, 64, 65, 256, 257, 300):
        found = rows_of(computers(3, AMX), inputs, np.arange(count), weights).astype(np.float64)
        assert np.abs(found - expected[:count]).max() / np.abs(expected).max() < 1e-2


@amx_only
@given(some=st.lists(st.integers(0, 299), min_size=1, max_size=300, unique=True).map(sorted))
@settings(deadline=None)  # the first time may compile
def test_matrix_instructions_give_a_row_the_same_bits_in_any_company(some):
    computer, (weights,) = CpuExperts(2, AMX), experts(ml_dtypes.bfloat16, 160, 96, 1)
    inputs = np.random.default_rng(2).standard_normal((300, 160)).astype(ml_dtypes.bfloat16)
    everything = rows_of(computer, inputs, np.arange(300), weights)
    found = rows_of(computer, inputs, np.array(some), weights)
    np.testing.assert_array_equal(bits(found), bits(everything[some]))
    one = rows_of(computer, inputs, np.array(some[:1]), weights)
    np.testing.assert_array_equal(bits(one), bits(everything[some[:1]]))
    computer.close()


@amx_only
def test_matrix_instructions_leave_no_shapes_behind(computers):
    """XLA and others that use tiles in the same thread find them as they were."""
    weights = experts(ml_dtypes.bfloat16, 64, 64, 1)
    memory = np.zeros(128, np.uint8)
    at = -(-memory.ctypes.data // 64) * 64

    @njit
    def shapes(to):
        amx.store_shapes(to)

    shapes(at)
    before = memory.copy()
    rows_of(computers(1, AMX), np.ones((3, 64), ml_dtypes.bfloat16), np.arange(3), weights[0])
    memory[:] = 1
    shapes(at)
    np.testing.assert_array_equal(
        memory[at - memory.ctypes.data :][:64], before[at - memory.ctypes.data :][:64]
    )


@pytest.mark.parametrize("x", [-200.0, -87.5, -10.0, -1e-3, 0.0, 1e-3, 1.0, 20.0, 88.5, 1e30, np.nan])
def test_silu(x):
    exact = x / (1 + np.exp(-np.float64(x)))
    assert silu(np.float32(x)) == pytest.approx(exact, rel=3e-7, abs=1e-30, nan_ok=True)


def test_silu_everywhere():
    x = np.linspace(-80, 80, 20_001).astype(np.float32)
    found = np.array([silu(one) for one in x], np.float64)
    np.testing.assert_allclose(found, x.astype(np.float64) / (1 + np.exp(-x.astype(np.float64))), rtol=4e-7)


EXACT = {
    gelu: lambda x: 0.5 * x * np.array([math.erfc(-one / math.sqrt(2)) for one in x]),
    gelu_tanh: lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}


@pytest.mark.parametrize("function", EXACT, ids=["gelu", "gelu_tanh"])
def test_gelu_everywhere(function):
    x = np.linspace(-14, 14, 20_001).astype(np.float32)
    found = np.array([function(one) for one in x], np.float64)
    exact = EXACT[function](x.astype(np.float64))
    np.testing.assert_allclose(found, exact, rtol=3e-7, atol=2e-7)
    theirs = jax.nn.gelu(jnp.asarray(x), approximate=function is gelu_tanh)
    np.testing.assert_allclose(found, np.asarray(theirs), rtol=4e-7, atol=1e-6)
    large = [function(np.float32(one)) for one in (1e30, -1e30, np.nan)]
    np.testing.assert_allclose(large, [1e30, 0, np.nan], rtol=1e-6, atol=1e-7)


def test_clamped_everywhere():
    rng, body = np.random.default_rng(0), ExpertBody("clamped", limit=2.5)
    gates, ups = rng.normal(0, 3, (2, 2000)).astype(np.float32)
    gates[:4], ups[:4] = (np.nan, 1, -1e30, 1e30), (1, np.nan, 1e30, -1e30)
    limit = np.float32(body.limit)
    found = [clamped(gate, up, limit) for gate, up in zip(gates, ups, strict=True)]
    expected = np.asarray(body.gated(jnp.asarray(gates), jnp.asarray(ups)))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    assert (np.abs(gates) > body.limit).any()
    assert (np.abs(ups) > body.limit).any()


def test_threads_share_the_experts_out_and_change_no_bit(computers, monkeypatch):
    monkeypatch.setattr(cpu, "SHARE_BYTES", 1)
    weights = experts(np.float32, 32, 48, 7)
    rng = np.random.default_rng(3)
    rows = Assignments(np.argsort(rng.random((9, 7)), 1)[:, :3].astype(np.int32))
    inputs = rng.standard_normal((9, 32)).astype(np.float32)
    held = [InMemory.of(expert) for expert in weights]
    found = []
    for computer in (computers(1, LOOPS), computers(3, LOOPS)):
        outputs = np.zeros((28, 32), np.float32)
        computer.compute(
            outputs, inputs, rows, rows.demand, lambda some: list(map(held.__getitem__, some)), WorkStats()
        )
        found.append(outputs[:-1])
    assert np.abs(found[0]).max(1).min() > 0
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("kind", [np.float32, np.int16])
def test_inputs_begin_where_a_line_of_the_caches_does(kind):
    make = njit(lambda tokens, width, weights: room(tokens, width, weights))
    for tokens in range(1, 9):
        made = make(tokens, 7, np.empty(1, kind))
        assert made.dtype == kind
        assert made.shape == (tokens, 7 + 64 // made.itemsize)
        assert made.ctypes.data % 64 == 0
