"""A policy from outside the package: by name in the engine, the simulator and on the command line."""

import json

import pytest
from helpers import random_model

import layerscope_jax as ls
from layerscope_jax.cli import main as cli
from layerscope_jax.scheduling.registry import FORECASTING, is_policy, make_policy, policy_names

pytestmark = pytest.mark.usefixtures("quick_compiles")


def test_it_generates_the_same_tokens_within_a_budget(example):
    model, prompts = random_model(), [[5, 20, 7], [17]]
    with ls.Engine(model) as engine:
        expected = engine.generate(prompts, max_new_tokens=6)
    half = ls.OffloadConfig(device_budget=model.bank.total_bytes // 2, policy="fifo")
    with ls.Engine(model, half) as engine:
        found = engine.generate(prompts, max_new_tokens=6, record_plans=True)
    assert found.token_ids == expected.token_ids
    assert found.stats.policy == "fifo"
    assert found.stats.bytes_moved > 0
    assert any(plan.evict for plan in found.plans)


def test_what_was_loaded_first_leaves_first(example):
    """Not what was used least recently: expert 0 is used again before room is short."""
    fifo = make_policy("fifo")
    shape = ls.Geometry(num_layers=1, num_experts=2, experts_per_token=1, expert_bytes=1, slots=2)
    state, resident, evicted = fifo.init(shape, None), set(), []
    for step, expert in enumerate([0, 1, 0, 2, 0]):
        seen = ls.Observation(
            step=step, layer=0, phase="decode", demand={expert: 1}, resident=resident, in_flight=()
        )
        state, plan = fifo.plan(state, seen)
        resident = resident.difference(plan.evict).union(plan.load)
        evicted += [left.expert for left in plan.evict]
    assert evicted == [0, 1]


def test_the_command_line_knows_it(example, capsys):
    assert "fifo" in policy_names()
    assert cli.main(["generate", "nowhere", "--prompt=x", "--policy=last-out"]) == 2
    assert ", fiddler, fifo, host-only, " in capsys.readouterr().err


def test_it_is_simulated_beside_the_others(example, tmp_path):
    rows = tmp_path / "rows.json"
    command = [
        "simulate",
        "--profile=mixtral-8x7b",
        "--batch=4",
        "--decode-steps=3",
        f"--out={rows}",
        "--policy",
        "fifo",
        "lru",
    ]
    assert cli.main(command) == 0
    found = json.loads(rows.read_text())["rows"]
    assert {(row["policy"], row["predictor"]) for row in found} == {("fifo", None), ("lru", None)}


def test_a_budget_that_it_refuses_is_no_fault(example, capsys):
    make_policy("fifo")
    with pytest.raises(ValueError, match="too small for policy 'fifo'") as refused:
        make_policy("fifo").init(
            ls.Geometry(num_layers=2, num_experts=8, experts_per_token=2, expert_bytes=1, slots=3), None
        )
    assert cli.exits.code_of(refused.value) == cli.exits.REFUSED


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ({"gone": "no_such_module:Policy"}, "'gone' of package 'broken' cannot be imported"),
        ({"gone": "json:JSONDecoder"}, "a policy must be a class with name, uses_costs"),
        ({"gone": "policy:FIFO"}, "entry point 'gone' must name a policy of that name, got 'fifo'"),
    ],
    ids=["missing", "no policy", "another name"],
)
def test_a_package_that_is_broken_is_named(example, install, points, message):
    install("broken", {"layerscope.policies": points})
    with pytest.raises(ValueError, match=message):
        is_policy("gone")


def test_what_it_says_of_itself_is_checked():
    class Ahead:
        name, uses_costs, uses_forecasts = "ahead", False, True

        def init(self, geometry, profile):
            pass

        def plan(self, state, seen):
            pass

    assert ls.register_policy(Ahead) is Ahead
    assert ls.register_policy(Ahead) is Ahead  # a module may be imported twice
    assert "ahead" in FORECASTING
    with pytest.raises(ValueError, match=r"must be a class with .*, which has no plan"):
        ls.register_policy(type("Half", (), {"name": "x", "uses_costs": 0, "uses_forecasts": 0, "init": 0}))
    with pytest.raises(ValueError, match="must be text, such as 'fifo', got 5"):
        ls.register_policy(type("Five", (Ahead,), {"name": 5}))
    with pytest.raises(ValueError, match="a policy is named 'ahead' already"):
        ls.register_policy(type("Other", (Ahead,), {}))


def test_a_near_miss_is_named(example):
    with pytest.raises(ValueError, match=r"got 'fif'; did you mean 'fifo'\?"):
        make_policy("fif")
    with pytest.raises(ValueError, match="which has no uses_costs, plan"):
        make_policy(type("Half", (), {"name": "half", "init": None})())
