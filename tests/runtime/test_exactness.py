"""Whatever a policy decides, the logits have the same bits; only the time differs.

The oracle is the same engine with everything resident, whose decode steps are one program each. It agrees to
rounding in float32 with the whole model as XLA alone compiles it. What each program's fusions could change is
looked at in programs as users have them; what else there is, in programs that are compiled quickly.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_cases import SHIPPED, RandomPolicy, agree, case, oracle, place, run
from helpers import PROFILE, Copies, copying_by, in_time, one_jit, random_model
from hypothesis import given, settings
from hypothesis import strategies as st

from layerscope_jax import POLICIES, Engine, OffloadConfig
from layerscope_jax.models.config import DeltaSizes
from layerscope_jax.models.experts import ExpertBody
from layerscope_jax.models.rotary import PAD_POSITION
from layerscope_jax.runtime.whole import WholeModel
from layerscope_jax.scheduling.registry import FORECASTING

needs_shipped = pytest.mark.skipif(
    not (SHIPPED / "config.json").exists(), reason="no model is shipped with this checkout"
)

TOLERANCE = 2e-5
"""Of logits of size 1 to 3 in float32: the differences seen are a tenth of it."""


quick = pytest.mark.usefixtures("quick_compiles")

NAMES = ["float32", "bfloat16"]
any_plan = given(data=st.data(), seed=st.integers(0, 2**32 - 1), rate=st.sampled_from([0.0, 0.0, 0.3]))


def planned_at_random(name, data, seed, rate):
    model, batches, steps = case(name)
    experts = list(model.bank)
    slots = data.draw(st.integers(0, len(experts)), "slots")
    share = st.sampled_from([0.0, 0.3, 0.7, 1.0])
    policy = RandomPolicy(
        seed, data.draw(share, "device"), data.draw(share, "restless"), data.draw(share, "ahead")
    )
    config = OffloadConfig(device_budget=slots * model.bank.expert_bytes, policy=policy)
    with copying_by(Copies(rate, seed)), Engine(model, config) as engine:
        place(
            engine,
            data.draw(st.permutations(experts), "resident")[: data.draw(st.integers(0, slots), "placed")],
        )
        agree(in_time(lambda: run(engine, batches, steps)), oracle(name))
        residency = engine.runner.residency
        assert residency.used_bytes <= residency.peak_bytes <= engine.budget_bytes


@pytest.mark.parametrize("name", NAMES)
@any_plan
@settings(deadline=None, max_examples=8)
def test_any_plan_gives_the_same_bits(name, data, seed, rate):
    planned_at_random(name, data, seed, rate)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("policy", ["lru", "on-demand", "host-only", "fiddler"])
@given(data=st.data(), rate=st.sampled_from([0.0, 0.3]))
@settings(deadline=None, max_examples=3)
def test_any_policy_gives_the_same_bits(name, policy, data, rate):
    model, batches, steps = case(name)
    experts = list(model.bank)
    least = model.bank.num_experts if policy in ("lru", "on-demand") else 0
    slots = data.draw(st.integers(least, len(experts) - 1), "slots")
    config = OffloadConfig(device_budget=slots * model.bank.expert_bytes, policy=policy, profile=PROFILE)
    with copying_by(Copies(rate, 0)), Engine(model, config) as engine:
        place(
            engine,
            data.draw(st.permutations(experts), "resident")[: data.draw(st.integers(0, slots), "placed")],
        )
        agree(in_time(lambda: run(engine, batches, steps)), oracle(name))


@pytest.mark.parametrize(
    "policy", sorted(POLICIES.keys() - {"lru", "on-demand", "host-only", "fiddler", "resident"})
)
@given(data=st.data(), rate=st.sampled_from([0.0, 0.3]))
@settings(deadline=None, max_examples=3)
def test_all_other_policies_give_the_same_bits(policy, data, rate):
    """One model for these, with a forecast for those that use one.

    It is computed inside the layer's own program, which it must not change.
    """
    model, batches, steps = case("float32")
    slots = data.draw(st.integers(model.bank.num_experts, len(list(model.bank)) - 1), "slots")
    config = OffloadConfig(
        device_budget=slots * model.bank.expert_bytes,
        policy=policy,
        profile=PROFILE,
        predictor="gate" if policy in FORECASTING else None,
    )
    with copying_by(Copies(rate, 0)), Engine(model, config) as engine:
        assert (engine.runner.forecasts.name is None) == (policy not in FORECASTING)
        agree(in_time(lambda: run(engine, batches, steps)), oracle("float32"))


def test_by_default_the_budget_changes_no_bit():
    """Everything resident goes by one program a step, every smaller budget by programs of layers.

    With gated DeltaNet, in a layer without experts, before gated attention.
    """
    model = random_model(
        dtype=jnp.bfloat16,
        seed=7,
        delta=DeltaSizes(key_heads=2, value_heads=4, key=8, value=32, taps=4),
        num_layers=2,
        full_attention_layers=(1,),
        attention_gate=True,
        norm="rms_offset",
        dense_layers=(0,),
        intermediate_size=40,
    )
    requests = [[5, 20, 7], [17], list(range(30, 58)), [9, 9, 9, 50, 3]]
    found = []
    for budget in (None, 5 * model.bank.expert_bytes):
        config = OffloadConfig(device_budget=budget, policy="fiddler", profile=PROFILE)
        with Engine(model, config) as engine:
            assert engine.runner.mode == ("decode" if budget is None else "layers")
            found.append(run(engine, [requests], 4))
    agree(*found)


@quick
@any_plan
@settings(deadline=None, max_examples=6)
def test_any_plan_of_a_long_prompt_gives_the_same_bits(data, seed, rate):
    planned_at_random("long", data, seed, rate)


def scored(name):
    """Logits of the engine's own sequences, from one jit of the whole model that sees them complete."""
    model, batches, steps = case(name)
    decoder = model.whole()
    whole = jax.jit(lambda tokens, positions: decoder(tokens, positions)[0])
    rows = max(map(len, batches))
    width = max(len(prompt) for batch in batches for prompt in batch) + steps
    for batch, new in zip(batches, oracle(name)[0], strict=True):
        sequences = np.zeros((rows, width), np.int32)
        positions = np.full((rows, width), PAD_POSITION, np.int32)
        for row, sequence in enumerate(map(list.__add__, batch, new)):
            sequences[row, : len(sequence)] = sequence
            positions[row, : len(sequence)] = np.arange(len(sequence))
        logits = np.asarray(whole(sequences, positions))
        for step in range(steps):
            yield np.stack([logits[row, len(prompt) - 1 + step] for row, prompt in enumerate(batch)])


@quick
def test_the_whole_model_in_one_jit_agrees_to_rounding():
    tokens, logits = oracle("long")
    flat = [list(step) for batch in tokens for step in zip(*batch, strict=True)]
    for found, expected, chosen in zip(logits, scored("long"), flat, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
        assert expected.argmax(-1).tolist() == chosen


@quick
def test_fast_numerics_agree_to_rounding():
    model, batches, steps = case("long")
    tokens, logits = oracle("long")
    with one_jit(), Engine(model, OffloadConfig(numerics="fast")) as engine:
        assert isinstance(engine.runner, WholeModel)
        fast_tokens, fast_logits = run(engine, batches, steps)
    assert fast_tokens == tokens
    for fast, exact in zip(fast_logits, logits, strict=True):
        np.testing.assert_allclose(fast, exact, rtol=0, atol=TOLERANCE)


@needs_shipped
@quick
@given(
    data=st.data(),
    policy=st.sampled_from([None, None, "lru", "on-demand", "host-only", "fiddler"]),
    rate=st.sampled_from([0.0, 0.1]),
)
@settings(deadline=None, max_examples=3)
def test_the_shipped_model_gives_the_same_bits(data, policy, rate):
    """Under random valid plans (no policy) and under the policies there are."""
    model, batches, steps = case("shipped")
    experts = list(model.bank)
    least = model.bank.num_experts if policy in ("lru", "on-demand") else 0
    slots = data.draw(st.integers(least, len(experts) - 1), "slots")
    seed = data.draw(st.integers(0, 2**32 - 1), "seed")
    rng = np.random.default_rng(seed)  # Hypothesis would be slow to draw permutations of a thousand
    config = OffloadConfig(
        device_budget=slots * model.bank.expert_bytes,
        policy=policy or RandomPolicy(seed, *rng.random(3)),
        profile=PROFILE,
    )
    with copying_by(Copies(rate, seed)), Engine(model, config) as engine:
        place(engine, [experts[i] for i in rng.permutation(len(experts))[: rng.integers(0, slots + 1)]])
        agree(in_time(lambda: run(engine, batches, steps)), oracle("shipped"))
        assert engine.runner.residency.peak_bytes <= engine.budget_bytes


CLAMPED = ExpertBody("clamped", bias=True, limit=0.7)


@quick
def test_clamped_experts_with_biases_have_the_same_bits_anywhere():
    """Behind attention with biases and a window."""
    attention = {"qk_norm": "none", "attention_bias": True, "sliding_window": 5}
    model = random_model(seed=8, num_layers=2, expert_body=CLAMPED, **attention)
    found, requests = {}, [[5, 20, 7], [17], list(range(30, 58))]
    for policy, slots in (("resident", 16), ("lru", 9), ("on-demand", 8), ("host-only", 0)):
        config = OffloadConfig(device_budget=slots * model.bank.expert_bytes, policy=policy, profile=PROFILE)
        with Engine(model, config) as engine:
            assert engine.runner.mode == ("decode" if policy == "resident" else "layers")
            found[policy] = run(engine, [requests], 4)
            assert engine.runner.host_experts.cpu.kernel is not None
    for policy in found:
        agree(found[policy], found["resident"])
    whole = jax.jit(lambda tokens, positions: model.whole()(tokens, positions)[0])
    exact = whole(np.array([requests[0]], np.int32), np.arange(3, dtype=np.int32)[None])
    np.testing.assert_allclose(found["resident"][1][0][0], exact[0, -1], rtol=0, atol=TOLERANCE)
