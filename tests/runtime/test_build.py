"""Which runner a model gets, and of what it is made; nothing is compiled for it."""

import threading

import pytest
from helpers import PROFILE, one_jit, random_model

from layerscope_jax import POLICIES, ExpertId, PolicyBase
from layerscope_jax.runtime.accounts import Account
from layerscope_jax.runtime.build import build
from layerscope_jax.scheduling.caching import LRU
from layerscope_jax.scheduling.registry import make_policy


@pytest.fixture(scope="module")
def model():
    return random_model(num_layers=2)


def unasked(*_):
    raise AssertionError("nothing is to be measured")


def built(model, policy, budget, measure=unasked, **options):
    """What a runner is, once it was made and closed."""
    runner = build(
        model, make_policy(policy), budget_bytes=budget * model.bank.expert_bytes, measure=measure, **options
    )
    runner.close()
    return runner


@pytest.mark.parametrize(
    ("policy", "options", "accelerator", "expected"),
    [
        ("auto", {}, False, ("resident", {"decode", "layers"})),
        ("auto", {}, True, ("resident", {"decode", "layers"})),
        ("auto", {"numerics": "fast"}, True, ("resident", {"whole"})),
        ("resident", {"numerics": "fast"}, False, ("resident", {"decode", "layers"})),
        ("host-only", {"numerics": "fast"}, True, ("host-only", {"layers"})),
        (LRU(), {"policy_is_obeyed": True, "numerics": "fast"}, True, ("lru", {"layers"})),
        (
            POLICIES["resident"](),
            {"policy_is_obeyed": True, "numerics": "fast"},
            True,
            ("resident", {"whole"}),
        ),
    ],
)
def test_where_everything_fits_there_is_nothing_to_decide_but_for_who_insists(
    model, policy, options, accelerator, expected
):
    with one_jit(accelerator):
        runner = built(model, policy, 16, **options)
    assert runner.policy.name == expected[0]
    assert runner.mode in expected[1]
    assert runner.costs is None


def test_costs_are_measured_if_a_policy_needs_them_and_none_are_known(model):
    asked = []

    def measure(measured, host, transfers, slots):
        asked.append((measured, slots))
        return PROFILE

    assert built(model, "presched", 9, measure).costs is PROFILE
    assert asked == [(model, 9)]
    assert built(model, "presched", 9, costs=PROFILE).costs is PROFILE
    assert built(model, "lru", 9).costs is None


def test_a_policy_has_its_own_predictor_where_none_was_chosen(model):
    assert built(model, "auto", 9, costs=PROFILE).forecasts.name == "gate"
    assert built(model, "fate", 9).forecasts.name is None
    assert built(model, "auto", 16).forecasts.name is None


class Refuses(PolicyBase):
    name = "refuses"

    def init(self, geometry, profile):
        raise ValueError(f"no room in {geometry.slots}")


def test_a_runner_that_cannot_be_made_leaves_no_thread(model):
    before = set(threading.enumerate())
    with pytest.raises(ValueError, match="no room in 9"):
        build(model, Refuses(), budget_bytes=9 * model.bank.expert_bytes, measure=unasked)
    assert set(threading.enumerate()) <= before


def test_a_call_that_goes_on_where_nobody_else_was_finds_the_books_as_they_were(model):
    """What was fetched ahead before a pause and used after it was not fetched in vain."""
    runner, expert = built(model, "lru", 9), ExpertId(1, 3)
    books, first, second = runner.residency, Account(), Account()
    runner.reset(first)
    books.reserve(expert, prefetched=True)
    books.arrive(expert, None)
    runner.reset(None)
    assert runner.stats(first).peak_expert_bytes == model.bank.expert_bytes
    assert first.wasted_bytes == model.bank.expert_bytes  # so far
    runner.reset(first)
    books.use(1, [3])
    books.evict(expert)
    runner.reset(None)
    assert first.wasted_bytes == 0
    runner.reset(second)
    runner.reset(first)
    assert second.peak_bytes == second.wasted_bytes == 0
    assert runner.stats(first).peak_expert_bytes == model.bank.expert_bytes


def test_a_budget_for_less_than_one_expert_is_told(model, caplog):
    build(
        model,
        make_policy("fiddler"),
        budget_bytes=model.bank.expert_bytes - 1,
        measure=unasked,
        costs=PROFILE,
    ).close()
    assert "one expert takes 7,680: none will be on the device" in caplog.text
    caplog.clear()
    built(model, "host-only", 0)
    assert not caplog.text
