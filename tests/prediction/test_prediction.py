"""Forecasts: they are what they say, and no token depends on them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixed_forecasts import Fixed, Noise
from helpers import TINY, random_decoder, random_model
from hypothesis import given, settings
from hypothesis import strategies as st

from layerscope_jax import Engine, Geometry, Model, Observation, OffloadConfig
from layerscope_jax.prediction.bases import Learner, PredictorBase
from layerscope_jax.prediction.forecasts import Forecasts, counted_rows, expected_tokens
from layerscope_jax.prediction.predictors import (
    PREDICTORS,
    NextGate,
    Popularity,
    PreviousToken,
    make_predictor,
)

pytestmark = pytest.mark.usefixtures("quick_compiles")  # bits are the business of test_exactness.py

GEOMETRY = Geometry(num_layers=3, num_experts=8, experts_per_token=2, expert_bytes=1, slots=8)
PROMPTS = [[5, 20, 7], [17], list(range(30, 44)), [9, 9, 9, 50, 3]]
BUDGET = 10 * 3 * 4 * 32 * 20  # ten experts of the 24


def seen(layer, demand, step=0):
    return Observation(step=step, layer=layer, phase="decode", demand=demand, resident=(), in_flight=())


def generated(model, **changes):
    """Tokens, the plans, the forecasts that the policy saw, and the statistics."""
    config = OffloadConfig(device_budget=BUDGET, **({"policy": "fate"} | changes))
    with Engine(model, config) as engine:
        policy, forecasts = engine.runner.policy, []

        def plan(state, seen, plan=policy.plan):
            forecasts.append((seen.layer, seen.forecast))
            return plan(state, seen)

        engine.runner.policy.plan = plan
        result = engine.generate(PROMPTS, max_new_tokens=6, record_plans=True)
    return result, forecasts


@pytest.mark.parametrize(
    ("predictor", "dtype"),
    [(each, "float32") for each in (*PREDICTORS, Fixed(np.nan), Fixed(np.inf), Fixed(0.5), Noise(0.0))]
    + [("gate", "bfloat16")],
    ids=str,
)
def test_no_token_depends_on_a_forecast(predictor, dtype):
    model = random_model(dtype=jnp.dtype(dtype))
    with Engine(model) as engine:
        oracle = engine.generate(PROMPTS, max_new_tokens=6).token_ids
    result, forecasts = generated(model, predictor=predictor)
    assert result.token_ids == oracle
    values = np.array([forecast for _, forecast in forecasts if forecast])
    assert np.isfinite(values).all()
    assert (values >= 0).all()


def test_the_gate_foresees_all_where_nothing_comes_between():
    """If attention and experts add nothing to the hidden state, the next router sees what this one saw."""
    decoder = random_decoder(TINY)
    for layer, experts in zip(decoder.layers, decoder.experts, strict=True):
        layer.attention.o.weight[...] = jnp.zeros_like(layer.attention.o.weight[...])
        experts.down[...] = jnp.zeros_like(experts.down[...])
    config = OffloadConfig(device_budget=BUDGET, policy="fate", predictor="gate")
    with Engine(Model.from_decoder(decoder), config) as engine:
        stats = engine.generate(PROMPTS, max_new_tokens=6).stats
    # Two of three layers: what the last one sees is no forecast of the next step, and counts as none.
    assert stats.forecast_recall >= 2 / 3


def test_statistics_of_forecasts():
    result, forecasts = generated(random_model(), predictor="previous-token")
    assert result.stats.predictor == "previous-token"
    assert 0 < result.stats.forecast_recall <= 1
    plain, nothing = generated(random_model())
    assert plain.stats.predictor is plain.stats.forecast_recall is plain.stats.prefetch_on_time is None
    assert all(forecast == () for _, forecast in nothing)
    assert plain.stats.bytes_prefetch == 0
    assert forecasts[0][1] == [[0.0] * 8] * 4  # nothing is known before the first step


def test_the_forecast_is_the_sum_over_the_rows_that_count():
    """Layers of this step get all tokens, those of the next one the newest of each request."""
    result, forecasts = generated(random_model(), predictor=Fixed(0.25))
    tokens, requests = sum(map(len, PROMPTS)), len(PROMPTS)
    prefill = [forecast for _, forecast in forecasts[:3]]
    assert [[row[0] for row in forecast] for forecast in prefill] == [
        [0.25 * tokens, 0.25 * tokens],
        [0.25 * tokens, 0.25 * requests],
        [0.25 * requests, 0.25 * requests],
    ]
    assert forecasts[3][1][0][0] == 0.25 * requests
    assert len(result.plans) == len(forecasts)


def test_engines_share_the_programs_of_a_predictor():
    """One for prefill and one for decoding, whatever the layer: the forecast is a part of them."""
    model, programs = random_model(vocab_size=59, seed=77), []  # a shape of its own
    for predictor in ("gate", NextGate()):
        config = OffloadConfig(device_budget=BUDGET, policy="fate", predictor=predictor)
        with Engine(model, config) as engine:
            programs.append(engine.runner.dense.programs.attend_and_route)
            before = programs[-1]._cache_size()
            engine.generate(PROMPTS, max_new_tokens=6)
    assert programs[0] is programs[1]
    assert (
        programs[0]._cache_size() == before <= 4
    )  # two shapes, each of them with fresh and with used caches


def test_rows_that_do_not_count_may_hold_anything():
    probabilities = np.full((2, 3, 4), 0.5, np.float32)
    probabilities[:, 1] = np.nan
    counted = counted_rows(np.array([True, False, True]), np.array([2]), 3)
    expected = jax.jit(expected_tokens, static_argnums=3)
    found = expected(probabilities, counted, np.int32(1), 3)
    np.testing.assert_array_equal(found, [[1.0] * 4, [0.5] * 4])
    broken = expected(np.full((2, 3, 4), np.inf, np.float32), counted, np.int32(0), 3)
    np.testing.assert_array_equal(broken, np.zeros((2, 4)))


def test_the_gate_reads_the_next_routers():
    model = random_model()
    params, predict = NextGate(2).bind(model), jax.jit(NextGate(2).predict)
    inputs = np.random.default_rng(0).standard_normal((5, 32)).astype(np.float32)
    experts, weights = np.zeros((5, 2), np.int32), np.ones((5, 2), np.float32)
    found = predict(params[0], inputs, experts, weights)
    layers = jax.tree.map(np.asarray, model.dense["layers"])
    plain = inputs / layers[0]["moe_norm"]["scale"]
    for step, target in enumerate((1, 2)):
        logits = plain * layers[target]["moe_norm"]["scale"] @ layers[target]["router"]["weight"].T
        shares = np.exp(logits - logits.max(-1, keepdims=True))
        expected = np.minimum(1, 2 * shares / shares.sum(-1, keepdims=True))
        np.testing.assert_allclose(found[step], expected, atol=1e-5)
    last = predict(params[2], inputs, experts, weights)
    np.testing.assert_array_equal(last, np.zeros((2, 5, 8)))  # of the next step it knows nothing


def test_histories_look_back():
    previous, popular = PreviousToken(2), Popularity(2, memory=0.5)
    first, second = previous.init(GEOMETRY), popular.init(GEOMETRY)
    for step, demand in enumerate(({1: 4}, {1: 2, 5: 2})):
        for layer in range(3):
            first = previous.update(first, seen(layer, demand, step))
            second = popular.update(second, seen(layer, demand, step))
    assert previous.expected(first, 2, 8) == [[0, 4, 0, 0, 0, 4, 0, 0]] * 2
    assert popular.expected(second, 0, 6) == [[0, 4, 0, 0, 0, 2, 0, 0]] * 2


@given(
    layer=st.integers(0, 2),
    tokens=st.integers(1, 64),
    demands=st.lists(st.dictionaries(st.integers(0, 7), st.integers(1, 9), min_size=1), max_size=6),
)
@settings(deadline=None)
def test_histories_expect_as_many_tokens_as_there_are(layer, tokens, demands):
    for predictor in (PreviousToken(), Popularity()):
        state = predictor.init(GEOMETRY)
        for step, demand in enumerate(demands):
            for number in range(3):
                state = predictor.update(state, seen(number, demand, step))
        for row in predictor.expected(state, layer, tokens):
            assert sum(row) == pytest.approx(tokens if demands else 0)


def test_what_is_no_predictor_is_refused():
    with pytest.raises(
        ValueError, match=r"one of gate, popularity, previous-token, or a loaded predictor .* got 'magic'"
    ):
        make_predictor("magic")
    with pytest.raises(ValueError, match="an object with bind and predict"):
        make_predictor(3)
    with pytest.raises(ValueError, match="got 'magic'"):
        Engine(random_model(), OffloadConfig(device_budget=BUDGET, predictor="magic"))


def test_a_resident_model_forecasts_nothing():
    model = random_model()
    with Engine(model, OffloadConfig(predictor="gate")) as engine:
        assert engine.generate(PROMPTS, max_new_tokens=2).stats.predictor is None
    forecasts = Forecasts(None, model, GEOMETRY)
    assert forecasts.read(0, None, 4) == ()


class Attached(PredictorBase, Fixed):
    """Gives each engine a learner that keeps what it is shown."""

    predict = Fixed.predict

    def attach(self, model):
        self.learner = Kept(Fixed.bind(self, model))
        return self.learner


class Kept(Learner):
    learns = True

    def __init__(self, params):
        super().__init__(params)
        self.shown, self.closed = [], 0

    def observe(self, layer, inputs, experts, weights, active, phase):
        self.shown.append((layer, phase, experts.shape, int(active.sum())))

    def close(self):
        self.closed += 1


def test_a_learner_is_shown_every_layer_and_closed_once():
    predictor = Attached(0.5)
    result, _ = generated(random_model(), predictor=predictor)
    learner = predictor.learner
    assert [(layer, phase) for layer, phase, _, _ in learner.shown] == [
        *((layer, "prefill") for layer in range(3)),
        *((layer, "decode") for _ in range(5) for layer in range(3)),
    ]
    assert learner.shown[0][3] == sum(map(len, PROMPTS))
    assert learner.closed == 1
    assert result.stats.predictor == "fixed"


@pytest.mark.parametrize("extra", ["attach", "observe", "architecture"])
def test_parts_of_a_predictor_that_would_not_be_asked_for_are_refused(extra):
    predictor = Fixed(0.5)
    setattr(predictor, extra, None)
    with pytest.raises(ValueError, match=f"predictor 'fixed' has {extra}, used only of .*PredictorBase"):
        make_predictor(predictor)
