"""The sum over a token's experts by our own loop: what XLA's says, whoever helps, and nothing beside it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import bits
from hypothesis import given, settings
from hypothesis import strategies as st

from layerscope_jax.formats import format_named
from layerscope_jax.kernels import combining, crew
from layerscope_jax.kernels.cpu import CpuExperts
from layerscope_jax.kernels.host_kernels import kernel_of
from layerscope_jax.kernels.inside import Inside
from layerscope_jax.models import experts as compute

pytestmark = pytest.mark.usefixtures("quick_compiles")

SHAPES = [(1, 1, 1), (2, 8, 31), (64, 2, 96), (65, 1, 31), (65, 8, 96), (200, 2, 1), (200, 8, 31)]
"""Tokens, choices and width: each is a program; a thread takes 64 tokens at a time."""

ours = jax.jit(combining.combine)
by_xla = jax.jit(functools.partial(combining.combine, None))


@functools.cache
def made(threads):
    computer = CpuExperts(threads, kernel_of(format_named("float32"), np.dtype(np.float32), 32, 20))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crew, "WORTH_BYTES", 1)
        return Inside(computer, "float32", np.dtype(np.float32))


def drawn(seed, tokens, choices, width, dtype):
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((tokens, width)).astype(jnp.dtype(dtype))
    outputs = rng.standard_normal((tokens * choices + 1, width)).astype(jnp.dtype(dtype))
    return hidden, outputs, rng.random((tokens, choices), np.float32)


@given(
    seed=st.integers(0, 99),
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
@settings(deadline=None, max_examples=25)
def test_it_is_the_sum_and_a_token_is_its_own(seed, shape, dtype):
    tokens, choices, width = shape
    hidden, outputs, weights = drawn(seed, tokens, choices, width, dtype)
    found = [np.asarray(ours(made(threads).table, hidden, outputs, weights)) for threads in (1, 3)]
    np.testing.assert_array_equal(bits(found[0]), bits(found[1]))
    expected = np.asarray(by_xla(hidden, outputs, weights))
    # A sum that is rounded once more, or once less, than another: one unit in the last place of the result.
    tolerance = {"float32": 2e-6, "bfloat16": 2e-2}[dtype]
    np.testing.assert_allclose(
        found[0].astype(np.float32), expected.astype(np.float32), rtol=tolerance, atol=tolerance
    )
    alone = ours(made(1).table, hidden[-1:], outputs[(tokens - 1) * choices :], weights[-1:])
    np.testing.assert_array_equal(bits(np.asarray(alone)), bits(found[0][-1:]))


def test_other_types_are_left_to_xla():
    hidden, outputs, weights = drawn(0, 5, 2, 8, "float16")
    found = ours(made(1).table, hidden, outputs, weights)
    expected = compute.combine(hidden, outputs[:-1].reshape(5, 2, 8), weights)
    np.testing.assert_array_equal(bits(found), bits(expected))
