"""What predictors keep on the device is taken off its budget, and is no more than it has to be."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_programs import compiled
from fixed_forecasts import Fixed
from helpers import PROFILE, random_model
from synthetic import SMALL, llapor_of

from layerscope_jax import Engine, OffloadConfig
from layerscope_jax.prediction.forecasts import kept_bytes
from layerscope_jax.prediction.predictors import NextGate, routers_ahead
from predictor.llapor import LLaPor
from predictor.online import Online
from predictor.step import first_params, stacks

pytestmark = pytest.mark.usefixtures("quick_compiles")

PROMPTS = [[5, 20, 7], [17], list(range(30, 44))]


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(scope="module")
def llapor(model):
    return llapor_of(model)


def config(budget, predictor, policy="fate"):
    return OffloadConfig(device_budget=budget, policy=policy, numerics="auto", predictor=predictor)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gate_reads_routers_where_they_lie(dtype):
    """No copy of them, and the same forecasts as of scaled copies in float32."""
    model = random_model(dtype=jnp.dtype(dtype), num_layers=4)
    gate = NextGate(2)
    params = gate.bind(model)
    assert kept_bytes(params, model) == 0
    layers = [model.dense["layers"][index] for index in range(4)]
    weight, scale = (
        np.stack([np.asarray(layer[room][name], np.float32) for layer in layers])
        for room, name in (("router", "weight"), ("moe_norm", "scale"))
    )
    inputs = jax.random.normal(jax.random.key(0), (5, 32)).astype(dtype)
    experts, weights = jnp.zeros((5, 2), jnp.int32), jnp.ones((5, 2))
    for layer in range(4):
        copies = routers_ahead(weight, scale, layer, 2)
        logits = np.einsum("td,wed->wte", np.asarray(inputs, np.float32), copies)
        wanted = np.minimum(1, 2 * np.asarray(jax.nn.softmax(logits)))
        wanted[max(0, 3 - layer) :] = 0  # where there is no router
        found = gate.predict(params[layer], inputs, experts, weights)
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_auto_has_its_whole_budget_for_experts(model):
    budget = 10 * model.bank.expert_bytes
    measured = replace(config(budget, None, "auto"), profile=PROFILE)  # measuring has tests of its own
    with Engine(model, measured) as engine:
        stats = engine.generate(PROMPTS, max_new_tokens=2).stats
        assert engine.runner.residency.slots == 10
    assert (stats.predictor, stats.predictor_bytes) == ("gate", 0)


@pytest.mark.parametrize("learns", [False, True])
def test_a_trained_predictor_is_paid_for_by_experts(model, llapor, learns):
    predictor, each = Online(llapor) if learns else llapor, model.bank.expert_bytes
    params = llapor.bind(model)
    bytes_of = [sum(leaf.nbytes for leaf in jax.tree.leaves(layer) if leaf.ndim) for layer in params]
    kept = sum(bytes_of) + learns * max(bytes_of)  # while one layer's are replaced, both are there
    budget = kept + 11 * each
    assert budget < model.bank.total_bytes
    with Engine(model, config(budget, predictor)) as engine:
        stats = engine.generate(PROMPTS, max_new_tokens=4).stats
        assert engine.runner.residency.slots == 11
    assert (stats.budget_bytes, stats.predictor_bytes) == (budget, kept)
    assert stats.peak_expert_bytes <= budget - kept
    with pytest.raises(ValueError, match=rf"too small for policy 'lru'.* predictor '.*' keeps {kept:,}$"):
        Engine(model, config(kept + 5 * each, predictor, "lru"))
    with pytest.raises(
        ValueError, match=rf"device_budget must hold what predictor '.*' keeps .*{kept:,} bytes"
    ):
        Engine(model, config(kept - 1, predictor, "host-only"))


def test_where_everything_fits_no_predictor_is_kept(model, llapor):
    with Engine(model, OffloadConfig(numerics="auto", predictor=llapor)) as engine:
        stats = engine.generate(PROMPTS, max_new_tokens=2).stats
    assert (stats.predictor, stats.predictor_bytes) == (None, 0)
    assert stats.peak_expert_bytes == model.bank.total_bytes


def test_what_lies_on_the_host_or_twice_in_a_list_is_not_counted(model):
    shared = jnp.ones((4, 8), jnp.float32)
    params = [(shared, np.ones((9, 9), np.float32), model.dense["layers"][0]["router"]["weight"])] * 3
    assert kept_bytes(params, model) == shared.nbytes
    host = jax.device_put(np.ones(7, np.float32), jax.devices("cpu")[1])
    assert kept_bytes([host], model) == 0


def test_matrices_lie_on_the_device_in_8_bits(model, llapor):
    """As on disk, so that a loaded predictor forecasts what a saved one did."""
    layer = llapor.bind(model)[0]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(layer.network) if leaf.ndim == 2} <= {
        "int8",
        "float32",
    }
    assert layer.network["output"]["weight"].values.dtype == layer.components.values.dtype == jnp.int8


def test_two_loaded_from_one_file_share_their_programs(tmp_path):
    model = random_model(vocab_size=57, seed=3)  # a shape of its own
    llapor = llapor_of(model)
    llapor.save(tmp_path)
    one, other = LLaPor.load(tmp_path), LLaPor.load(tmp_path)
    assert one == other == llapor
    assert hash(one) == hash(other)
    assert one != Fixed(0.5)
    budget, counts = model.bank.total_bytes * 3 // 4, []
    for predictor in (one, other, Online(one), Online(other)):
        before = len(compiled)
        with Engine(model, config(budget, predictor)) as engine:
            engine.generate(PROMPTS, max_new_tokens=3)
        counts.append(len(compiled) - before)
    assert counts[0] > 0
    assert counts[1] == 0
    assert counts[3] == 0
    assert Online(one) == Online(other)


def test_other_architectures_are_other_predictors(model, llapor):
    found = stacks(llapor.model, llapor.basis.width, 3, SMALL)
    longer = LLaPor(llapor.model, 3, llapor.basis, found, first_params(llapor.model, found, 3, 0))
    assert longer != llapor


def test_programs_keep_no_weights(model, llapor):
    """They stay for the next engine; what a predictor has learned does not."""
    with Engine(model, config(model.bank.total_bytes * 3 // 4, llapor)) as engine:
        assert not any(
            isinstance(value, jax.Array) for value in jax.tree.leaves(vars(engine.runner.forecasts.in_layer))
        )
        assert engine.runner.forecasts.in_layer is llapor.architecture
