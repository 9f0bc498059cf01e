"""Whatever a policy decides, the logits have the same bits; only the time differs.

The oracle is the same engine with everything resident. That one agrees to rounding in float32 with the whole
model in one jit, since XLA fuses the two differently, and with Hugging Face transformers.
"""

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import PROFILE, Copies, bits, in_time, random_model
from hypothesis import example, given, settings
from hypothesis import strategies as st

import layerscope_jax
from layerscope_jax import (
    POLICIES,
    Engine,
    ExpertId,
    LayerPlan,
    Model,
    OffloadConfig,
    Request,
    TransferError,
    load,
)
from layerscope_jax.models.layers import PAD_POSITION
from layerscope_jax.scheduling.baselines import FORECASTING
from layerscope_jax.whole import WholeModel

SHIPPED = Path(layerscope_jax.__file__).parent / "shipped"
SENTENCES = ["Once upon a time there was", "def main():"]
needs_shipped = pytest.mark.skipif(
    not (SHIPPED / "config.json").exists(), reason="no model is shipped with this checkout"
)

GOLDEN = sorted(file.parent for file in (Path(__file__).parent / "golden").glob("*/golden.npz"))
TOLERANCE = 2e-5
"""Of logits of size 1 to 3 in float32: the differences seen are a tenth of it."""


class RandomPolicy:
    """Valid plans, good and absurd ones alike: drops what it needs next, fetches what it has just dropped.

    Args:
        seed: a plan is a function of it, the step, the layer and what is seen.
        device: how likely an active expert is computed on the device, where there is room.
        restless: how likely a resident expert leaves.
        ahead: how much of the room left is used to prefetch, for any layer.
    """

    name = "random"
    uses_costs = False

    def __init__(self, seed=0, device=0.5, restless=0.3, ahead=0.7):
        self.seed, self.device, self.restless, self.ahead = seed, device, restless, ahead

    def init(self, geometry, profile):
        return geometry

    def plan(self, geometry, seen):
        rng = np.random.default_rng((self.seed, seen.step, seen.layer))

        def some(experts, share):
            return [expert for expert in sorted(experts) if rng.random() < share]

        active = {ExpertId(seen.layer, expert) for expert in seen.demand}
        coming, resident = set(seen.in_flight), set(seen.resident)
        chosen = set(some(active, self.device))
        evict = some(resident - chosen, self.restless)
        room = geometry.slots - len(resident) - len(coming) + len(evict)
        load = rng.permutation(len(missing := sorted(chosen - resident - coming)))[:room].tolist()
        load = [missing[index] for index in load]
        room -= len(load)
        device = (chosen & (resident | coming)) | set(load)
        every = {ExpertId(x, e) for x in range(geometry.num_layers) for e in range(geometry.num_experts)}
        absent = sorted(every - (resident - set(evict)) - coming - set(load))
        ahead = rng.permutation(len(absent))[: int(room * self.ahead)].tolist()
        return geometry, LayerPlan(
            step=seen.step,
            layer=seen.layer,
            device=tuple(rng.permutation(sorted(e.expert for e in device)).tolist()),
            host=tuple(rng.permutation(sorted(e.expert for e in active - device)).tolist()),
            evict=tuple(evict),
            load=tuple(load),
            prefetch=tuple(absent[index] for index in ahead),
        )


class Case(NamedTuple):
    """A model and what it is asked."""

    model: Model
    batches: list[list[list[int]]]
    steps: int


def prompts(rng, vocabulary, *sizes):
    return [rng.integers(0, vocabulary, size).tolist() for size in sizes]


@lru_cache
def case(name):
    rng = np.random.default_rng(5)
    if name == "float32":  # many experts: all sizes of dispatches
        model = random_model(num_experts=20, experts_per_token=4, num_layers=2, tie_embeddings=True)
        batches = [prompts(rng, 61, 1, 6, 3, 4, 2), prompts(rng, 61, 2, 4, 1, 3, 8, 5, 2, 1)]
        return Case(model, batches, 5)
    if name == "bfloat16":
        model = random_model(dtype=jnp.bfloat16, seed=1, attention_bias=False)
        return Case(model, [prompts(rng, 61, 3, 11), prompts(rng, 61, 16, 1)], 6)
    if name.startswith("shipped"):
        model = load(SHIPPED, dtype="float32" if name == "shipped in float32" else None)
        return Case(model, [[model.tokenizer.encode(text).ids for text in SENTENCES]], 2)
    # Experts with more rows than the largest bucket, one choice a token, up to the end of the context.
    model = random_model(num_experts=3, experts_per_token=1, num_layers=2, seed=2, max_positions=193)
    return Case(model, [prompts(rng, 61, 190, 170)], 3)


def tap(engine):
    """Every step's logits, rows that are still generating alone; kept in the list that is returned."""
    logits, step = [], engine.runner.step

    def tapped(tokens, positions, last, caches, sampling):
        found = step(tokens, positions, last, caches, sampling)
        active = positions[np.arange(len(last)), last] != PAD_POSITION
        logits.append(np.asarray(found[1])[active])
        return found

    engine.runner.step = tapped
    return logits


def run(engine, batches, steps):
    """Tokens and logits of every batch, one call each."""
    logits = tap(engine)
    tokens = [engine.generate(batch, max_new_tokens=steps).tokens for batch in batches]
    return tokens, logits


@lru_cache
def oracle(name):
    model, batches, steps = case(name)
    with Engine(model, OffloadConfig(numerics="exact")) as engine:
        tokens, logits = run(engine, batches, steps)
    assert len(logits) == len(batches) * steps
    return tokens, logits


def place(engine, experts):
    """Puts experts on the device before the first step."""
    residency, transfers = engine.runner.residency, engine.runner.transfers
    for expert in experts[: residency.slots]:
        residency.reserve(expert, prefetched=False)
        residency.arrive(expert, jax.device_put(engine.model.bank[expert], transfers.sharding))


def agree(found, expected):
    (tokens, logits), (expected_tokens, expected_logits) = found, expected
    assert len(logits) == len(expected_logits)
    for step, (here, there) in enumerate(zip(logits, expected_logits, strict=True)):
        assert np.isfinite(there).all()
        np.testing.assert_array_equal(bits(here), bits(there), err_msg=f"logits of step {step}")
    assert tokens == expected_tokens


NAMES = ["float32", "bfloat16", "long"]
settled = settings(deadline=None, max_examples=25)


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1), rate=st.sampled_from([0.0, 0.0, 0.3]))
@settled
def test_any_plan_gives_the_same_bits(name, data, seed, rate):
    model, batches, steps = case(name)
    experts = list(model.bank)
    slots = data.draw(st.integers(0, len(experts)), "slots")
    share = st.sampled_from([0.0, 0.3, 0.7, 1.0])
    policy = RandomPolicy(
        seed, data.draw(share, "device"), data.draw(share, "restless"), data.draw(share, "ahead")
    )
    config = OffloadConfig(device_budget=slots * model.bank.expert_bytes, policy=policy, numerics="exact")
    with Engine(model, config, copy=Copies(rate, seed)) as engine:
        place(
            engine,
            data.draw(st.permutations(experts), "resident")[: data.draw(st.integers(0, slots), "placed")],
        )
        agree(in_time(lambda: run(engine, batches, steps)), oracle(name))
        residency = engine.runner.residency
        assert residency.used_bytes <= residency.peak_bytes <= engine.budget_bytes


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("policy", ["lru", "on-demand", "host-only", "fiddler"])
@given(data=st.data(), rate=st.sampled_from([0.0, 0.3]))
@settings(deadline=None, max_examples=6)
def test_any_policy_gives_the_same_bits(name, policy, data, rate):
    model, batches, steps = case(name)
    experts = list(model.bank)
    least = model.bank.num_experts if policy in ("lru", "on-demand") else 0
    slots = data.draw(st.integers(least, len(experts) - 1), "slots")
    config = OffloadConfig(
        device_budget=slots * model.bank.expert_bytes, policy=policy, numerics="exact", profile=PROFILE
    )
    with Engine(model, config, copy=Copies(rate, 0)) as engine:
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
    """One model for these, with a forecast for those that use one."""
    model, batches, steps = case("float32")
    slots = data.draw(st.integers(model.bank.num_experts, len(list(model.bank)) - 1), "slots")
    config = OffloadConfig(
        device_budget=slots * model.bank.expert_bytes,
        policy=policy,
        numerics="exact",
        profile=PROFILE,
        predictor="gate" if policy in FORECASTING else None,
    )
    with Engine(model, config, copy=Copies(rate, 0)) as engine:
        agree(in_time(lambda: run(engine, batches, steps)), oracle("float32"))


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


@pytest.mark.parametrize("name", ["float32", "long", pytest.param("shipped in float32", marks=needs_shipped)])
def test_the_whole_model_in_one_jit_agrees_to_rounding(name):
    tokens, logits = oracle(name)
    flat = [list(step) for batch in tokens for step in zip(*batch, strict=True)]
    for found, expected, chosen in zip(logits, scored(name), flat, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
        assert expected.argmax(-1).tolist() == chosen


def test_fast_numerics_agree_to_rounding():
    model, batches, steps = case("float32")
    tokens, logits = oracle("float32")
    with Engine(model, OffloadConfig(numerics="fast")) as engine:
        assert isinstance(engine.runner, WholeModel)
        fast_tokens, fast_logits = run(engine, batches, steps)
    assert fast_tokens == tokens
    for fast, exact in zip(fast_logits, logits, strict=True):
        np.testing.assert_allclose(fast, exact, rtol=0, atol=TOLERANCE)


@given(
    seed=st.integers(0, 2**32 - 1),
    slots=st.integers(8, 23),
    policy=st.sampled_from(["lru", "on-demand", "random"]),
    at=st.integers(0, 4),
)
@example(seed=0, slots=8, policy="lru", at=0)
@example(seed=0, slots=23, policy="lru", at=4)
@example(seed=0, slots=23, policy="on-demand", at=4)
@settings(deadline=None, max_examples=20)
def test_an_engine_recovers_from_a_link_that_broke(seed, slots, policy, at):
    """In the middle of a call, a copy fails for good: an error, and the next call is right again."""
    model, batches, steps = case("bfloat16")
    copies = Copies()
    config = OffloadConfig(
        device_budget=slots * model.bank.expert_bytes,
        policy=RandomPolicy(seed, device=1.0, restless=0.9) if policy == "random" else policy,
        numerics="exact",
    )
    with Engine(model, config, copy=copies) as engine:
        runner = engine.runner
        step, reserve, calls, needed = runner.step, runner.residency.reserve, [], []

        def breaks(*inputs):
            calls.append(None)
            copies.broken = len(calls) > at
            return step(*inputs)

        def looks(expert, *, prefetched):
            if copies.broken and not prefetched:
                needed.append(expert)
            reserve(expert, prefetched=prefetched)

        runner.step, runner.residency.reserve = breaks, looks
        error = None
        try:
            in_time(lambda: engine.generate(batches[0], max_new_tokens=steps))
        except TransferError as caught:
            error = caught
        # A random plan may do without the link; the others load in every case, in the last step at least.
        assert needed or policy == "random"
        assert error is not None or not needed
        if error is not None:
            assert "to the device failed 3 times: injected" in str(error)
            assert not runner.residency.coming
        assert runner.residency.used_bytes <= engine.budget_bytes
        copies.broken = False
        runner.step, runner.residency.reserve = step, reserve
        agree(in_time(lambda: run(engine, batches, steps)), oracle("bfloat16"))


@pytest.mark.parametrize("where", ["policy.plan", "transfers.submit", "transfers.wait", "host_experts.start"])
@pytest.mark.parametrize("what", [KeyboardInterrupt, MemoryError])
def test_an_engine_recovers_from_an_interruption(where, what, monkeypatch):
    model, batches, steps = case("bfloat16")
    config = OffloadConfig(
        device_budget=9 * model.bank.expert_bytes, policy=RandomPolicy(3), numerics="exact"
    )
    with Engine(model, config) as engine:
        room, name = where.split(".")
        owner = getattr(engine.runner, room)
        original, calls = getattr(owner, name), []

        def interrupted(*arguments):
            calls.append(None)
            if len(calls) == 5:
                raise what
            return original(*arguments)

        monkeypatch.setattr(owner, name, interrupted)
        with pytest.raises(what):
            in_time(lambda: engine.generate(batches[0], max_new_tokens=steps))
        assert not engine.runner.residency.coming
        agree(in_time(lambda: run(engine, batches, steps)), oracle("bfloat16"))


def test_a_bad_plan_is_refused_and_does_no_harm():
    """Also one that asks for an expert that does not exist, which no link could bring."""
    model, batches, steps = case("bfloat16")

    class Wrong(RandomPolicy):
        wrong = True

        def plan(self, geometry, seen):
            state, plan = super().plan(geometry, seen)
            if self.wrong and seen.step == 1:
                return state, LayerPlan(**plan.to_json() | {"prefetch": (ExpertId(geometry.num_layers, 0),)})
            return state, plan

    policy = Wrong(3)
    config = OffloadConfig(device_budget=9 * model.bank.expert_bytes, policy=policy, numerics="exact")
    with Engine(model, config) as engine:
        with pytest.raises(ValueError, match="no such expert"):
            in_time(lambda: engine.generate(batches[0], max_new_tokens=steps))
        policy.wrong = False
        agree(in_time(lambda: run(engine, batches, steps)), oracle("bfloat16"))


def test_recorded_plans_can_be_replayed():
    model, batches, steps = case("bfloat16")
    budget = 10 * model.bank.expert_bytes
    with Engine(model, OffloadConfig(device_budget=budget, policy="lru")) as engine:
        recorded = engine.generate(batches[0], max_new_tokens=steps, record_plans=True)
    assert len(recorded.plans) == steps * model.config.num_layers
    replay = layerscope_jax.Replay(recorded.plans)
    with Engine(model, OffloadConfig(device_budget=budget, policy=replay)) as engine:
        again = engine.generate(batches[0], max_new_tokens=steps, record_plans=True)
    assert again.plans == recorded.plans
    assert again.tokens == recorded.tokens
    assert again.stats.bytes_moved == recorded.stats.bytes_moved


@needs_shipped
@given(
    data=st.data(),
    policy=st.sampled_from([None, None, "lru", "on-demand", "host-only", "fiddler"]),
    rate=st.sampled_from([0.0, 0.1]),
)
@settings(deadline=None, max_examples=5)
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
        numerics="exact",
        profile=PROFILE,
    )
    with Engine(model, config, copy=Copies(rate, seed)) as engine:
        place(engine, [experts[i] for i in rng.permutation(len(experts))[: rng.integers(0, slots + 1)]])
        agree(in_time(lambda: run(engine, batches, steps)), oracle("shipped"))
        assert engine.runner.residency.peak_bytes <= engine.budget_bytes


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
def test_the_engine_agrees_with_hugging_face(folder):
    """Within a small budget: logits after ragged prompts and parts of them, and long greedy continuations."""
    model, golden = load(folder), np.load(folder / "golden.npz")
    rows = [row[:size].tolist() for row, size in zip(golden["tokens"], golden["lengths"], strict=True)]
    requests = [Request(prompt=row, max_new_tokens=64) for row in rows]
    requests += [Request(prompt=row[: len(row) // 2], max_new_tokens=1) for row in rows]
    budget = (model.bank.num_experts + 3) * model.bank.expert_bytes
    with Engine(model, OffloadConfig(device_budget=budget, policy="lru", numerics="exact")) as engine:
        logits = tap(engine)
        result = engine.generate(requests)
    row = np.tile(np.arange(len(rows)), 2)
    expected = golden["logits"][row, [len(request.prompt) - 1 for request in requests]]
    np.testing.assert_allclose(logits[0], expected, rtol=0, atol=1e-4)
    assert result.tokens[: len(rows)] == golden["greedy"].tolist()
    assert result.stats.bytes_moved > 0
    assert result.stats.peak_expert_bytes <= budget < model.bank.total_bytes
