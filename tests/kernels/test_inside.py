"""Experts inside a jitted program: the rows that they have outside, whoever helps."""

import functools

import jax
import ml_dtypes
import numpy as np
import pytest
from helpers import bits
from hypothesis import given, settings
from hypothesis import strategies as st

from layerscope_jax.formats import format_named
from layerscope_jax.kernels import crew, inside
from layerscope_jax.kernels.cpu import CpuExperts, InMemory, WorkStats
from layerscope_jax.kernels.grouping import Assignments
from layerscope_jax.kernels.host_kernels import kernel_of
from layerscope_jax.kernels.inside import Inside
from layerscope_jax.kernels.products import products
from layerscope_jax.models.experts import SWIGLU, ExpertBody

EXPERTS = 9
CASES = {
    "float32": (np.float32, 44, 36),
    "bfloat16": (ml_dtypes.bfloat16, 44, 36),
    "even": (ml_dtypes.bfloat16, 64, 96),
    "biased float32": (np.float32, 44, 36),
    "biased even": (ml_dtypes.bfloat16, 64, 96),
}
CLAMPED = ExpertBody("clamped", bias=True, limit=0.7)

rows = jax.jit(inside.rows, static_argnums=0)


@functools.cache
def made(case, threads):
    """What computes outside, and inside, and the experts."""
    dtype, width, hidden = CASES[case]
    rng = np.random.default_rng(0)

    def matrix(*shape):
        return jax.device_put((rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(dtype))

    format = format_named(np.dtype(dtype).name).for_body(CLAMPED if "biased" in case else SWIGLU)
    shapes = [buffer.shape for buffer in format.buffers(width, hidden).values()]
    held = [InMemory.of(format.Expert(*(matrix(*shape) for shape in shapes)), format) for _ in range(EXPERTS)]
    computer = CpuExperts(threads, kernel_of(format, np.dtype(dtype), width, hidden))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crew, "WORTH_BYTES", 1)  # else one thread would compute experts of this size
        return computer, Inside(computer, np.dtype(dtype).name, np.dtype(dtype)), held


@given(tokens=st.integers(1, 150), choices=st.integers(1, 4), seed=st.integers(0, 99), data=st.data())
@settings(deadline=None, max_examples=25)
def test_rows_are_those_outside(tokens, choices, seed, data):
    case, threads = data.draw(st.sampled_from(sorted(CASES))), data.draw(st.sampled_from([1, 3]))
    outside, within, held = made(case, threads)
    dtype, width, _ = CASES[case]
    rng = np.random.default_rng(seed)
    tokens = 1 << tokens.bit_length()  # few shapes to compile
    active = rng.random(tokens) < 0.8
    chosen = np.argsort(rng.random((tokens, EXPERTS)), 1)[:, :choices].astype(np.int32)
    inputs = rng.standard_normal((tokens, width)).astype(dtype)
    found = rows(within.target, jax.device_put(inputs), chosen, active, within.table_of(held))
    assert found.shape == (tokens * choices, width)

    sorted_rows = Assignments(chosen, active)
    expected = np.zeros((tokens * choices + 1, width), dtype)
    weights = lambda some: [held[expert] for expert in some]  # noqa: E731
    outside.compute(expected, inputs, sorted_rows, sorted_rows.demand, weights, WorkStats())
    np.testing.assert_array_equal(bits(np.asarray(found)), bits(expected[:-1]))
    assert within.take_counts() == (len(sorted_rows.demand), active.sum() * choices)
    assert within.take_counts() == (0, 0)


def test_after_the_end_it_says_so():
    computer, _, _ = made("float32", 3)
    one = Inside(computer, "float32", np.dtype(np.float32))
    one.check_open()
    one.close()
    with pytest.raises(ValueError, match="make a new Engine"):
        one.check_open()


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(64, 96), (32, 4160), (96, 32), (40, 100)])
@pytest.mark.parametrize("case", ["even", "float32"])
def test_products_are_those_of_xla(name, shape, case):
    """Also where an engine's experts are of another type."""
    table = made(case, 3)[1].table
    rng = np.random.default_rng(1)
    weights = jax.device_put((rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(name))
    x = jax.device_put(rng.standard_normal((5, 27, shape[1])).astype(name))
    (found,) = jax.jit(products)(table, x, weights)
    assert (found.shape, found.dtype) == ((5, 27, shape[0]), x.dtype)
    exact = np.asarray(x, np.float64) @ np.asarray(weights, np.float64).T
    error = np.abs(np.asarray(found, np.float64) - exact).max() / np.abs(exact).max()
    assert error < {"float32": 1e-6, "bfloat16": 4e-3}[name]
    alone = [np.asarray(jax.jit(products)(table, x[:1, row : row + 1], weights)[0]) for row in (0, 26)]
    np.testing.assert_array_equal(bits(np.concatenate(alone, 1)[0]), bits(np.asarray(found)[0, [0, 26]]))


def test_products_at_the_same_time_do_not_mix():
    """A crew helps one at a time; who comes meanwhile computes alone."""
    table = made("float32", 3)[1].table
    rng = np.random.default_rng(2)
    x = jax.device_put(rng.standard_normal((3, 64)).astype(np.float32))
    many = [jax.device_put(rng.standard_normal((512, 64)).astype(np.float32)) for _ in range(24)]
    apart = jax.jit(lambda table, x, weights: products(table, x, weights)[0])
    together = jax.jit(lambda table, x, many: [products(table, x, weights)[0] for weights in many])
    expected = [np.asarray(apart(table, x, weights)) for weights in many]
    for _ in range(5):
        for found, wanted in zip(together(table, x, many), expected, strict=True):
            np.testing.assert_array_equal(np.asarray(found), wanted)


@pytest.mark.parametrize("rows", [1, 40, 600])
def test_products_of_several_matrices_are_those_of_each(rows):
    """One job, shared out by columns or, where there are many rows, by these."""
    table = made("float32", 3)[1].table
    rng = np.random.default_rng(3)
    x = jax.device_put(rng.standard_normal((rows, 64)).astype(np.float32))
    many = [jax.device_put(rng.standard_normal((width, 64)).astype(np.float32)) for width in (544, 32, 160)]
    together = jax.jit(products)(table, x, *many)
    for weights, found in zip(many, together, strict=True):
        (expected,) = jax.jit(products)(table, x, weights)
        np.testing.assert_array_equal(bits(np.asarray(found)), bits(np.asarray(expected)))
        exact = np.asarray(x, np.float64) @ np.asarray(weights, np.float64).T
        np.testing.assert_allclose(np.asarray(found), exact, rtol=0, atol=1e-4)
