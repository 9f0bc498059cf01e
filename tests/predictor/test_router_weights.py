"""The weight of the routers' forecast before training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from predictor.calibration import FIRST_WEIGHT, weight_and_bias
from predictor.network import router_margin
from predictor.routers import Prior

pytestmark = pytest.mark.usefixtures("quick_compiles")

ROWS, WIDTH, AHEAD, EXPERTS, CHOICES = 512, 6, 2, 8, 2


@given(size=st.floats(0.02, 5.0), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_small_logits_get_a_large_weight_and_no_other_has_less_loss(size, seed):
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((ROWS, WIDTH)).astype(np.float32)
    matrix = (size * rng.standard_normal((WIDTH, AHEAD, EXPERTS))).astype(np.float32)
    prior = Prior(jnp.asarray(matrix), jnp.zeros((AHEAD, EXPERTS), jnp.float32))
    # Routers of these layers read nearly this hidden state.
    later = hidden + 0.3 * rng.standard_normal(hidden.shape).astype(np.float32)
    chosen = np.argsort(-np.einsum("tp,phe->the", later, matrix), -1)[..., :CHOICES]
    truth = jnp.asarray((np.eye(EXPERTS, dtype=np.float32)[chosen]).sum(-2))
    experts = jnp.zeros((ROWS, CHOICES), jnp.int32)
    known = jnp.ones((ROWS, AHEAD), bool)
    weight, bias = weight_and_bias(prior, jnp.asarray(hidden), experts, truth, known)
    margin = router_margin(prior.logits(jnp.asarray(hidden)), CHOICES)

    def loss(weight, bias):
        logits = weight[None, :, None] * margin + bias[None, :, None]
        return float((jax.nn.softplus(logits) - truth * logits).mean())

    least = loss(weight, bias)
    for change in (0.9, 1.1):
        assert least <= loss(weight * jnp.float32(change), bias) + 1e-6
        assert least <= loss(weight, bias * jnp.float32(change)) + 1e-6
    if size < 0.1:
        assert weight.min() > 2 * FIRST_WEIGHT


def test_where_routers_say_nothing_the_bias_is_how_often_experts_are_chosen():
    prior = Prior(jnp.zeros((WIDTH, AHEAD, EXPERTS)), jnp.zeros((AHEAD, EXPERTS)))
    truth = jnp.asarray(np.tile(np.eye(EXPERTS, dtype=np.float32)[3], (ROWS, AHEAD, 1)))
    known = jnp.ones((ROWS, AHEAD), bool).at[:, 1].set(False)
    hidden, experts = jnp.ones((ROWS, WIDTH)), jnp.zeros((ROWS, CHOICES), jnp.int32)
    weight, bias = weight_and_bias(prior, hidden, experts, truth, known)
    np.testing.assert_allclose(weight, FIRST_WEIGHT, atol=1e-4)
    np.testing.assert_allclose(jax.nn.sigmoid(bias[0]), 1 / EXPERTS, atol=1e-4)
    assert np.isfinite(bias[1])
