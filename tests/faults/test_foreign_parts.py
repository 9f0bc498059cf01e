"""Policies and predictors of others: what they give is looked at, and no token suffers from what they do."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import pytest
from fixed_forecasts import Fixed
from helpers import PROFILE, random_model

from layerscope_jax import Engine, LayerPlan, OffloadConfig
from layerscope_jax.scheduling.caching import LRU
from layerscope_jax.scheduling.prefetching import Fate

pytestmark = pytest.mark.usefixtures("quick_compiles")

PROMPTS = [[5, 20, 7], [17], list(range(30, 44))]


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(scope="module")
def oracle(model):
    with Engine(model, OffloadConfig(numerics="auto")) as engine:
        return engine.generate(PROMPTS, max_new_tokens=5).token_ids


def config(model, policy="fate", predictor=None):
    return OffloadConfig(
        device_budget=10 * model.bank.expert_bytes,
        policy=policy,
        numerics="auto",
        predictor=predictor,
        profile=PROFILE,
    )


class Spoilt(LRU):
    """As LRU, but for one turn."""

    name = "spoilt"

    def __init__(self, spoil, step=2, layer=1):
        super().__init__()
        self.spoil, self.turn = spoil, (step, layer)

    def plan(self, state, seen):
        state, plan = super().plan(state, seen)
        if (seen.step, seen.layer) == self.turn:
            self.turn = None
            return self.spoil(state, plan)
        return state, plan


def fails(state, plan):
    raise LookupError("its own fault")


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (fails, LookupError, "its own fault"),
        (
            lambda state, plan: None,
            ValueError,
            r"policy 'spoilt' must return \(state, LayerPlan\), got 'None'",
        ),
        (lambda state, plan: plan, ValueError, r"policy 'spoilt' must return \(state, LayerPlan\)"),
        (
            lambda state, plan: (state, LayerPlan(step=plan.step, layer=plan.layer, device=("a", "b"))),
            ValueError,
            "step 2, layer 1, by policy 'spoilt'",
        ),
        (
            lambda state, plan: (state, LayerPlan(step=plan.step, layer=plan.layer, host=None)),
            ValueError,
            "step 2, layer 1, by policy 'spoilt'",
        ),
    ],
)
def test_a_policy_that_fails_once_spoils_nothing(model, oracle, spoil, error, message):
    with Engine(model, config(model, Spoilt(spoil))) as engine:
        with pytest.raises(error, match=message) as raised:
            engine.generate(PROMPTS, max_new_tokens=5)
        if error is LookupError:
            assert "policy 'spoilt', for step 2, layer 1" in raised.value.__notes__[0]
        assert engine.generate(PROMPTS, max_new_tokens=5).token_ids == oracle


class Shaped(Fixed):
    """Gives probabilities of another shape or dtype."""

    def __init__(self, change):
        super().__init__(0.5)
        self.change = change

    def __eq__(self, other):
        return self is other

    __hash__ = object.__hash__

    def predict(self, params, inputs, experts, weights):
        return self.change(super().predict(params, inputs, experts, weights))


@pytest.mark.parametrize(
    "change",
    [
        lambda found: found[0],
        lambda found: found[:1],
        lambda found: found[..., :-1],
        lambda found: found.swapaxes(0, 1),
        lambda found: found.astype(jnp.int32),
        lambda found: found > 0,
        lambda found: found.astype(jnp.complex64),
        lambda found: (found, found),
        lambda found: None,
        lambda found: 0.5,
    ],
)
def test_predictions_of_another_shape_are_refused_at_once(model, change):
    with pytest.raises(
        ValueError, match=r"predictor 'fixed': predict\(\) must return floating-point .* layer 0"
    ):
        Engine(model, config(model, predictor=Shaped(change)))


def test_what_a_predictor_raises_says_where(model):
    with pytest.raises(ZeroDivisionError) as raised:
        Engine(model, config(model, predictor=Shaped(lambda found: 1 // 0)))
    assert raised.value.__notes__[-1:] == ["in predict() of predictor 'fixed', traced for layer 0"]


@pytest.mark.parametrize("look_ahead", [0, -1, "2", 1.5, None])
def test_a_look_ahead_that_is_none_is_refused(model, look_ahead):
    predictor = Fixed(0.5)
    predictor.bind = lambda model: [jnp.zeros((2, 1, 8))] * 3
    predictor.look_ahead = look_ahead
    with pytest.raises(ValueError, match="look_ahead must be a whole number, 1 or more"):
        Engine(model, config(model, predictor=predictor))


@pytest.mark.parametrize("bound", [None, [], [1.0, 2.0], 7, {"0": 1}], ids=str)
def test_parameters_of_other_layers_are_refused(model, bound):
    predictor = Fixed(0.5)
    predictor.bind = lambda model: bound
    with pytest.raises(ValueError, match=r"bind\(\) must return parameters for each of 3 layers"):
        Engine(model, config(model, predictor=predictor))


@dataclass
class Unhashable:
    name = "unhashable"
    look_ahead = 1

    def bind(self, model):
        return []

    def predict(self, params, inputs, experts, weights):
        return None


@pytest.mark.parametrize(
    ("predictor", "message"), [(Unhashable(), "must be hashable"), (Fixed, "the class Fixed")]
)
def test_objects_that_are_no_predictors_are_refused(model, predictor, message):
    with pytest.raises(ValueError, match=message):
        Engine(model, config(model, predictor=predictor))


class Remembers:
    """A history that expects what it is told to."""

    name, look_ahead = "remembers", 2

    def __init__(self, value):
        self.value = value

    def init(self, geometry):
        return geometry.num_experts

    def update(self, state, seen):
        return state

    def expected(self, state, layer, tokens):
        return self.value(state)


@pytest.mark.parametrize(
    "value",
    [
        lambda experts: [[float("nan")] * experts],
        lambda experts: [[float("inf")] * experts, [1.0] * experts],
        lambda experts: [[-1e300, *[1e300] * (experts - 1)]],
        lambda experts: np.full((2, experts), np.nan).tolist(),
        lambda experts: np.full((2, experts), 0.5),
        lambda experts: [],
    ],
)
@pytest.mark.parametrize("policy", ["auto", "hybrimoe"])
def test_what_is_no_number_of_tokens_breaks_no_plan(model, oracle, policy, value):
    with Engine(model, config(model, policy, Remembers(value))) as engine:
        kept = engine.runner.policy.plan

        def plan(state, seen):
            expected = np.array(seen.forecast, float)
            assert np.isfinite(expected).all()
            assert (expected >= 0).all()
            return kept(state, seen)

        engine.runner.policy.plan = plan
        assert engine.generate(PROMPTS, max_new_tokens=5).token_ids == oracle


@pytest.mark.parametrize(
    "value",
    [lambda experts: None, lambda experts: [[1.0]], lambda experts: 3, lambda experts: [["a"] * experts]],
)
def test_a_history_that_expects_no_numbers_is_named(model, value):
    message = r"predictor 'remembers': expected\(\) must return lists of 8"
    with Engine(model, config(model, predictor=Remembers(value))) as engine:
        with pytest.raises(ValueError, match=message):
            engine.generate(PROMPTS, max_new_tokens=2)
        assert engine.runner.residency.slots == 10


def test_numbers_that_are_none_in_the_layer_break_no_plan(model, oracle):
    for value in (np.nan, -np.inf, 1e30):
        with Engine(model, config(model, Fate(), Fixed(value))) as engine:
            assert engine.generate(PROMPTS, max_new_tokens=5).token_ids == oracle


def test_a_predictor_with_weights_on_the_host_is_run(model, oracle):
    """They cross to the device each time, and take no room there."""
    predictor = Fixed(0.5)
    predictor.bind = lambda model: [np.full((2, 1, 8), 0.5, np.float32)] * 3
    with Engine(model, config(model, predictor=predictor)) as engine:
        result = engine.generate(PROMPTS, max_new_tokens=5)
    assert result.token_ids == oracle
    assert result.stats.predictor_bytes == 0
