"""The memory of gated DeltaNet by our own loop: what the definition says, wherever tokens are cut."""

import functools

import jax
import numpy as np
import pytest
from crews import table
from helpers import bits
from hypothesis import given, settings
from hypothesis import strategies as st

from layerscope_jax.kernels.delta_memory import COLUMNS, delta_memory, remember_head
from layerscope_jax.kernels.vectors import LANES
from layerscope_jax.models.delta_net import scan, step

pytestmark = pytest.mark.usefixtures("quick_compiles")  # equal bits are those of our own loop

ours = jax.jit(delta_memory)


def drawn(rng, batch, tokens, keys, shared, size, width):
    """Queries, keys, values, fading, rates and states; some tokens are padding."""
    values = keys * shared

    def numbers(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    query, key = (
        x / np.linalg.norm(x, axis=-1, keepdims=True) for x in numbers(2, batch, tokens, keys, size)
    )
    real = rng.random((batch, tokens, 1)) < 0.9
    fade = np.where(real, -np.abs(numbers(batch, tokens, values)) / 5, 0).astype(np.float32)
    rate = np.where(real, 1 / (1 + np.exp(-numbers(batch, tokens, values))), 0).astype(np.float32)
    value, state = numbers(batch, tokens, values, width), numbers(batch, values, size, width)
    return query, key, value, fade, rate, state


def defined(query, key, value, fade, rate, state):
    """Token by token in float64."""
    query, key, value, fade, rate, state = (
        np.float64(part) for part in (query, key, value, fade, rate, state)
    )
    shared, found = value.shape[2] // key.shape[2], []
    for token in range(value.shape[1]):
        asks, says = (part[:, token].repeat(shared, 1) for part in (query, key))
        state = state * np.exp(fade[:, token])[..., None, None]
        missing = value[:, token] - np.einsum("bhk,bhkv->bhv", says, state)
        state = state + np.einsum("bhk,bhv->bhkv", says, missing * rate[:, token, :, None])
        found.append(np.einsum("bhk,bhkv->bhv", asks, state))
    return np.stack(found, 1), state


@given(
    tokens=st.sampled_from([1, 2, 9]),
    size=st.sampled_from([1, 7, 24]),
    registers=st.sampled_from([1, 3, COLUMNS // LANES, COLUMNS // LANES + 1]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60)
def test_a_head_is_what_the_definition_says(tokens, size, registers, seed):
    inputs = drawn(np.random.default_rng(seed), 1, tokens, 1, 1, size, LANES * registers)
    query, key, value, fade, rate, state = (part[0] for part in inputs)
    read, after, room = np.empty_like(value), np.empty_like(state), np.empty((size, COLUMNS), np.float32)
    heads = (part[:, 0] for part in (query, key, value, np.exp(fade), rate))
    remember_head(*heads, state[0], after[0], read[:, 0], room)
    for one, known in zip((read[None], after[None]), defined(*inputs), strict=True):
        np.testing.assert_allclose(one, known, rtol=0, atol=2e-5)


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("threads", [1, 3])
def test_rows_and_heads_are_what_the_definition_says(tokens, threads):
    inputs = drawn(np.random.default_rng(tokens), 3, tokens, 2, 3, 7, COLUMNS + LANES)
    for one, known in zip(ours(table(threads)[1], *inputs), defined(*inputs), strict=True):
        np.testing.assert_allclose(one, known, rtol=0, atol=2e-5)


@functools.cache
def one_prompt():
    inputs = drawn(np.random.default_rng(3), 3, 12, 2, 2, 16, 2 * COLUMNS + LANES)
    return inputs, jax.tree.map(np.asarray, ours(table(3)[1], *inputs))


def test_it_is_what_xla_computes():
    (*tokens, state), (read, after) = one_prompt()
    found, left = jax.jit(scan)(*tokens, state)
    np.testing.assert_allclose(found, read, rtol=0, atol=2e-6)
    np.testing.assert_allclose(left, after, rtol=0, atol=2e-6)
    found, _ = jax.jit(step)(*(part[:, :1] for part in tokens), state)
    np.testing.assert_allclose(found, read[:, :1], rtol=0, atol=2e-6)


@given(cut=st.sampled_from([1, 5, 11]), row=st.integers(0, 2), threads=st.sampled_from([1, 3]))
@settings(deadline=None, max_examples=8)
def test_no_bit_depends_on_cuts_on_companions_or_on_threads(cut, row, threads):
    (*tokens, state), (read, after) = one_prompt()
    _, known = table(threads)
    first, between = ours(known, *(part[row : row + 1, :cut] for part in tokens), state[row : row + 1])
    rest, end = ours(known, *(part[row : row + 1, cut:] for part in tokens), between)
    np.testing.assert_array_equal(bits(np.concatenate([first, rest], 1)), bits(read[row : row + 1]))
    np.testing.assert_array_equal(bits(np.asarray(end)), bits(after[row : row + 1]))


@pytest.mark.parametrize("threads", [1, 3])
def test_numbers_too_small_are_zero_on_every_thread(threads):
    """As for XLA; some CPUs take ten times as long for them."""
    *tokens, state = drawn(np.random.default_rng(0), 8, 64, 4, 4, 64, COLUMNS)
    state[:], tokens[4][:] = 1e-39, 0
    _, after = ours(table(threads)[1], *tokens, state)
    assert not np.asarray(after).any()


def test_padding_changes_no_bit_of_a_state():
    *tokens, state = drawn(np.random.default_rng(0), 1, 3, 1, 2, 8, LANES)
    tokens[3][:], tokens[4][:] = 0, 0
    np.testing.assert_array_equal(bits(np.asarray(ours(table(1)[1], *tokens, state)[1])), bits(state))


def test_what_is_no_whole_register_is_xlas():
    inputs = drawn(np.random.default_rng(0), 1, 3, 1, 1, 8, LANES + 1)
    assert delta_memory(table(1)[1], *inputs) is None
