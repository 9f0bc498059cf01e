"""The gate knows the biases of the routers that it reads, in an engine and on the scorecard."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_model

from layerscope_jax.models.router import choose
from layerscope_jax.models.routing_rules import RoutingRule
from layerscope_jax.prediction.predictors import NextGate
from predictor.baselines import Gate, Popularity
from predictor.dataset import Rows
from predictor.pca import Basis
from predictor.routers import Routers

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.mark.parametrize(
    "rule",
    [
        RoutingRule(score="top_k_softmax", logit_bias=True),
        RoutingRule(score="sigmoid", selection_bias=True),
        RoutingRule(score="softmax", selection_bias=True),
    ],
)
def test_the_gate_and_the_scorecard_know_the_biases_of_routers(rule, tmp_path):
    """For a hidden state that stays as it is, they rank first what the next router chooses."""
    model = random_model(num_layers=2, routing=rule)
    own, target = model.dense["layers"][0], model.dense["layers"][1]
    name = "bias" if rule.logit_bias else "selection_bias"
    # Biases for choosing are of any size in published models; only their differences count.
    bias = (0 if rule.logit_bias else 7) + 0.3 * jax.random.normal(jax.random.key(1), (8,))
    target["router"][name] = bias
    inputs = jax.random.normal(jax.random.key(0), (64, 32))
    read = inputs / own["moe_norm"]["scale"][None] * target["moe_norm"]["scale"][None]
    logits = read @ target["router"]["weight"].T
    added = (logits + bias[None], None) if rule.logit_bias else (logits, bias)
    chosen = np.asarray(choose(*added, rule, 2, False).experts)
    assert (chosen != np.asarray(choose(logits, None, rule, 2, False).experts)).any()

    def ranks_first(shares):
        first = np.sort(np.argsort(-shares, -1)[:, :2], -1)
        return (first == np.sort(chosen, -1)).all(-1).mean() > 0.95  # the rest are ties, but for rounding

    experts, weights = jnp.zeros((64, 2), jnp.int32), jnp.ones((64, 2))
    found = NextGate(1).predict(NextGate(1).bind(model)[0], inputs, experts, weights)
    assert ranks_first(np.asarray(found[0]))

    Routers.of(model).save(tmp_path)
    eye = np.broadcast_to(np.eye(32, dtype=np.float32), (2, 32, 32))
    basis = Basis(np.zeros((2, 32), np.float32), eye, np.ones((2, 32), np.float32))
    gate = Gate(Routers.load(tmp_path), basis, Popularity(np.zeros((2, 8), np.float32), (1,)), 2)
    rows = Rows(
        (), np.asarray(inputs)[:, None].repeat(2, 1), *[np.zeros((64, 2, 2), int)] * 2, np.zeros(64, int)
    )
    assert ranks_first(gate.forecast(rows, 0).ranking[:, 0])
