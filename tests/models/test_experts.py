"""All experts in one stack give what a plain loop over experts gives, and so do their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import bits
from hypothesis import example, given, settings
from hypothesis import strategies as st

from layerscope_jax.models.experts import ExpertWeights, block_rows, combine, ffn, matmul, stacked_ffn

pytestmark = pytest.mark.usefixtures("quick_compiles")

HIDDEN, INNER = 6, 5


def stack(num_experts, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))
    return ExpertWeights(*(rng.standard_normal((num_experts, *shape)).astype(dtype) for shape in shapes))


def inputs(tokens, seed=1, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal((tokens, HIDDEN)).astype(dtype)


def plain(x, experts, weights):
    """[T, K, D]: each expert by itself over its own tokens, in float64."""
    x, weights = np.asarray(x, np.float64), ExpertWeights(*(np.asarray(w, np.float64) for w in weights))
    outputs = np.full((*experts.shape, HIDDEN), np.nan)
    for expert in range(len(weights.gate)):
        token, choice = np.nonzero(experts == expert)
        gate = x[token] @ weights.gate[expert].T
        inner = gate / (1 + np.exp(-gate)) * (x[token] @ weights.up[expert].T)
        outputs[token, choice] = inner @ weights.down[expert].T
    return outputs


def plain_loss(x, weights, experts, cotangent):
    """As `plain` in JAX, dense: every expert over every token, masked. Its gradient is JAX's own."""
    total = 0.0
    for expert in range(weights.gate.shape[0]):
        gate, up = x @ weights.gate[expert].T, x @ weights.up[expert].T
        rows = (jax.nn.silu(gate) * up) @ weights.down[expert].T
        total += jnp.sum(jnp.where((experts == expert)[:, :, None], rows[:, None] * cotangent, 0.0))
    return total


CASES = {
    "one token": ([[4, 0]], 5),
    "one token, one choice": ([[2]], 3),
    "one expert there is": ([[0]] * 4, 1),
    "all tokens to one expert": ([[3]] * 37, 8),
    "the last experts unused": ([[0, 1]] * 9, 7),
    "the first experts unused": ([[6, 5]] * 9, 7),
    "uneven": ([[0, 1, 2]] * 11 + [[5, 0, 3]] * 8 + [[4, 5, 0]], 6),
    "more experts than assignments": ([[17, 3], [20, 17]], 23),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_a_loop_over_experts(case):
    experts, num_experts = CASES[case]
    experts = np.array(experts, np.int32)
    x, weights = inputs(len(experts)), stack(num_experts)
    cotangent = np.random.default_rng(2).standard_normal((*experts.shape, HIDDEN)).astype(np.float32)

    @jax.jit
    def run(x, weights):
        outputs, pull = jax.vjp(lambda x, weights: stacked_ffn(x, experts, weights), x, weights)
        return outputs, pull(cotangent)

    outputs, gradients = run(x, weights)
    np.testing.assert_allclose(outputs, plain(x, experts, weights), rtol=1e-5, atol=1e-5)
    expected = jax.jit(jax.grad(plain_loss, argnums=(0, 1)))(x, weights, experts, cotangent)
    for found, wanted in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    unused = sorted(set(range(num_experts)) - set(experts.ravel().tolist()))
    assert not any(np.asarray(gradient)[unused].any() for gradient in gradients[1])


def test_bfloat16_rounds_a_result_summed_in_float32():
    experts = np.array(CASES["uneven"][0], np.int32)
    x, weights = inputs(len(experts), dtype=jnp.bfloat16), stack(6, dtype=jnp.bfloat16)
    outputs = jax.jit(stacked_ffn)(x, experts, weights)
    assert outputs.dtype == jnp.bfloat16
    expected = plain(x, experts, weights)
    # Two roundings to 8 bits, of the inner activations and of the result, by up to 2**-9 each.
    scale = np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(outputs, np.float64), expected, rtol=2**-7, atol=2**-8 * scale)


COMPILED = jax.jit(stacked_ffn)
MANY, CHOICES, EXPERTS = 21, 3, 7


@given(st.lists(st.integers(0, EXPERTS - 1), min_size=MANY * CHOICES, max_size=MANY * CHOICES))
@example([0] * 57 + [1, 2, 3, 4, 5, 6])  # fills as many blocks as there can be
@settings(deadline=None, max_examples=60)
def test_any_routing_drops_no_token(chosen):
    """Also a routing that no router makes: a token may choose one expert several times."""
    experts = np.array(chosen, np.int32).reshape(MANY, CHOICES)
    x, weights = inputs(MANY), stack(EXPERTS)
    outputs = COMPILED(x, experts, weights)
    np.testing.assert_allclose(outputs, plain(x, experts, weights), rtol=1e-5, atol=1e-5)


@given(st.integers(1, 10**6), st.integers(1, 512))
def test_blocks_have_two_rows_or_more(assignments, num_experts):
    rows = block_rows(assignments, num_experts)
    assert rows in {2, 4, 8, 16, 32, 64}
    assert rows == 2 or rows <= max(1, assignments // (2 * num_experts))


def test_combine_adds_choices_first_to_last():
    """Bit by bit the sum ((w0 y0 + w1 y1) + w2 y2) + ..., which another order would round differently."""
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((16, HIDDEN)).astype(np.float32)
    outputs = (rng.standard_normal((16, 5, HIDDEN)) * 10.0 ** rng.integers(-3, 4, (16, 5, 1))).astype(
        np.float32
    )
    # Powers of two: their products are exact, so that a fused multiply-add rounds no differently.
    weights = (2.0 ** rng.integers(-3, 1, (16, 5))).astype(np.float32)
    total, backwards = np.zeros_like(hidden), np.zeros_like(hidden)
    for choice in range(5):
        total += weights[:, choice, None] * outputs[:, choice]
        backwards += weights[:, 4 - choice, None] * outputs[:, 4 - choice]
    assert (total != backwards).any()
    np.testing.assert_array_equal(bits(jax.jit(combine)(hidden, outputs, weights)), bits(hidden + total))


def test_combine_in_bfloat16_sums_in_float32():
    """256 + 1 + 1 is 256 where each sum is rounded to 8 bits, and 258 where only the last one is."""
    hidden = jnp.zeros((1, 2), jnp.bfloat16)
    outputs = jnp.array([[[256.0, 256.0], [1.0, 1.0], [1.0, 1.0]]], jnp.bfloat16)
    result = combine(hidden, outputs, jnp.ones((1, 3)))
    assert result.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(result, np.float32), 258.0)


def test_matmul_sums_in_float32():
    ones = jnp.ones((1, 300), jnp.bfloat16)
    assert matmul(ones, ones).dtype == jnp.bfloat16
    assert float(matmul(ones, ones)[0, 0]) == 300.0  # a sum in bfloat16 stays at 256


def test_ffn_takes_rows_with_leading_axes():
    x, weights = inputs(12).reshape(3, 4, HIDDEN), stack(3)
    outputs = np.asarray(ffn(x, weights))
    for index in range(3):
        experts = np.full((4, 1), index)
        expected = plain(x[index], experts, weights)[:, 0]
        np.testing.assert_allclose(outputs[index], expected, rtol=1e-5, atol=1e-5)
