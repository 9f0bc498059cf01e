"""Experts that several devices share: the tokens of one device, each with its own budget, links and plans."""

import re
import threading

import jax
import numpy as np
import pytest
from exact_cases import RandomPolicy
from helpers import PROFILE, bits, copying_by, random_model

from layerscope_jax import Engine, ExpertId, LayerPlan, OffloadConfig, TransferError, load
from layerscope_jax.models.cache import new_caches
from layerscope_jax.models.decoder import Between
from layerscope_jax.models.rotary import PAD_POSITION
from layerscope_jax.offload.partition import Partition
from layerscope_jax.offload.slotted import SlottedExperts
from layerscope_jax.offload.split_rows import SplitRows, exchanged_bytes
from layerscope_jax.runtime import device_side
from layerscope_jax.runtime.expert_parallel import ExpertParallel

PROMPTS = [[1, 2, 3], list(range(16)), [7]]


@pytest.fixture(scope="module")
def model():
    return random_model(seed=12)  # 8 experts a layer


@pytest.fixture(scope="module")
def answers(model):
    with Engine(model, OffloadConfig(numerics="exact")) as engine:
        return engine.generate(PROMPTS, max_new_tokens=12, logprobs=2)


@pytest.fixture(scope="module")
def tokens(model):
    """For tests whose programs XLA optimises little: the bits of `answers` are not theirs."""
    with Engine(model) as engine:
        return engine.generate(PROMPTS, max_new_tokens=12).token_ids


def config_of(model, slots, policy, **others):
    size = model.bank.expert_bytes
    return OffloadConfig(device_budget=slots * size, policy=policy, profile=PROFILE, **others)


def logprobs_of(result):
    return [[token.logprob for token in completion.logprobs] for completion in result]


@pytest.mark.parametrize(
    ("policy", "devices"),
    [("lru", 1), ("presched", 2), ("host-only", 4), ("random", 4)],
)
def test_every_bit_is_that_of_one_device(model, answers, policy, devices):
    chosen = RandomPolicy() if policy == "random" else policy
    with Engine(model.over(devices), config_of(model, 8, chosen, numerics="exact")) as engine:
        assert isinstance(engine.runner, ExpertParallel)
        for _ in range(2):
            result = engine.generate(PROMPTS, max_new_tokens=12, logprobs=2)
            assert result.token_ids == answers.token_ids
            assert logprobs_of(result) == logprobs_of(answers)
        for side in engine.runner.sides:
            assert side.residency.peak_bytes <= engine.budget_bytes
            assert len(side.bank.layers[0]) == model.config.num_experts // devices
        assert result.stats.mode == "expert-parallel"


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize("policy", ["fiddler", "random"])
def test_accelerators_keep_their_experts_in_slots(model, tokens, policy, monkeypatch):
    monkeypatch.setattr(device_side, "device_experts", lambda device, cpu: SlottedExperts(device, cpu.format))
    chosen = RandomPolicy() if policy == "random" else policy
    with Engine(model.over(2), config_of(model, 6, chosen)) as engine:
        for _ in range(2):
            assert engine.generate(PROMPTS, max_new_tokens=12).token_ids == tokens
        for side in engine.runner.sides:
            held = side.residency
            for expert in list(held.resident):
                (slot,) = held.use(expert.layer, [expert.expert])
                views = model.bank.views(ExpertId(expert.layer, side.own.start + expert.expert))
                for array, view in zip(side.experts._pool, views, strict=True):
                    assert array.devices() == {side.device}
                    np.testing.assert_array_equal(array[slot], view)


def test_all_experts_resident_are_each_on_their_owner(model, answers):
    with Engine(model.over(4), OffloadConfig(numerics="exact")) as engine:
        result = engine.generate(PROMPTS, max_new_tokens=12, logprobs=2)
        assert logprobs_of(result) == logprobs_of(answers)
        assert engine.policy.name == "resident"
        assert engine.budget_bytes == model.bank.total_bytes // 4
        for side in engine.runner.sides:
            assert len(side.residency.resident) == len(list(model.bank)) // 4


@pytest.mark.usefixtures("quick_compiles")
def test_a_link_that_fails_costs_a_step_and_nothing_else(model, tokens, monkeypatch):
    """Of four, one: all sides settle, and the next call gets the same tokens."""
    monkeypatch.setattr(device_side, "device_experts", lambda device, cpu: SlottedExperts(device, cpu.format))
    broken, before = [True], set(threading.enumerate())

    def copy(array, sharding):
        if broken[0] and sharding.device_set == {jax.devices()[2]}:
            raise OSError("no such device")
        return jax.device_put(array, sharding)

    with copying_by(copy), Engine(model.over(4), config_of(model, 4, "lru")) as engine:
        with pytest.raises(TransferError, match="no such device"):
            engine.generate(PROMPTS, max_new_tokens=4)
        for side in engine.runner.sides:
            assert not side.residency.coming
        broken[0] = False
        assert engine.generate(PROMPTS, max_new_tokens=12).token_ids == tokens
    assert set(threading.enumerate()) <= before


@pytest.mark.usefixtures("quick_compiles")
def test_the_bound_is_that_of_the_device_that_takes_longest(model):
    found = {}
    for devices in (1, 2):
        with Engine(model.over(devices), config_of(model, 8, "lru")) as engine:
            stats = engine.generate(PROMPTS, max_new_tokens=6, bound=True).stats
            found[devices] = stats.share_of_bound * stats.tpot_s
            assert engine.runner.costs == PROFILE
    assert 0 < found[2] < found[1]  # two devices may be faster than any one


@pytest.mark.usefixtures("quick_compiles")
def test_plans_and_counts_are_of_the_whole_layer(model):
    with Engine(model.over(2), config_of(model, 8, "lru")) as engine:
        result = engine.generate(PROMPTS, max_new_tokens=3, record_plans=True)
    experts = model.config.num_experts
    for plan in result.plans:
        assert isinstance(plan, LayerPlan)
        assert not plan.host
        assert set(plan.device) <= set(range(experts))
    assert {expert for plan in result.plans for expert in plan.device} == set(range(experts))
    loaded = sum(len(plan.load) for plan in result.plans)
    assert result.stats.bytes_demand == loaded * model.bank.expert_bytes
    needed = sum(len(plan.device) for plan in result.plans)
    assert result.stats.hit_rate == pytest.approx(1 - loaded / needed)


def test_devices_exchange_as_many_bytes_as_on_paper(model):
    """One sum over all devices a layer, of the rows and nothing else."""
    parted, config, tokens = model.over(4), model.config, 4
    with Engine(parted, config_of(model, 8, "host-only")) as engine:
        stats = engine.generate([[5]], max_new_tokens=3).stats
        layer = engine.runner.dense
        width, choices, size = config.hidden_size, config.experts_per_token, model.bank.dtype.itemsize
        steps = 3  # a prefill, whose prompt is padded to some width, and two decode steps
        one = exchanged_bytes(1, choices, width, size, 4)
        first = stats.bytes_exchanged // config.num_moe_layers - (steps - 1) * one
        assert first % one == 0  # the prefill's
        assert first >= one
        rows = tokens * choices
        outputs = SplitRows(
            parted.partition.joined([np.zeros((rows + 1, width), model.bank.dtype)] * 4),
            parted.put(np.zeros((tokens, choices), np.int32)),
            parted.partition.each,
        )
        hidden = parted.put(np.zeros((tokens, 1, width), model.bank.dtype))
        state = Between(hidden, outputs, parted.put(np.zeros((tokens, choices), np.float32)))
        places = parted.put(np.full((tokens, 1), PAD_POSITION, np.int32))
        caches = new_caches(config, tokens, 16, model.bank.dtype, parted.place)[:1]
        lowered = layer.attend_alone.lower(
            layer.layers[1], state, places, caches, None, None, None, layer.table, None
        )
    text = lowered.compile().as_text()
    sums = re.findall(r"= (\w+)\[([\d,]*)\]\S* all-reduce\(", text)
    assert [kind for kind, _ in sums] == ["u32"]
    sent = 4 * np.prod([int(n) for n in sums[0][1].split(",")])
    assert 2 * 3 * sent == exchanged_bytes(tokens, choices, width, size, 4)
    for other in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert f"{other}(" not in text


def test_a_checkpoint_is_loaded_to_its_owners():
    model = load("shipped", devices=2, format="int8")
    assert model.partition.devices == tuple(jax.devices()[:2])
    for expert in (0, 31, 32, 63):
        (device,) = model.bank[ExpertId(3, expert)][0].devices()
        assert device == jax.devices()[expert // 32]
    one = load("shipped", format="int8")
    for ours, theirs in zip(jax.tree.leaves(model.dense), jax.tree.leaves(one.dense), strict=True):
        assert ours.devices() == set(jax.devices()[:2])
        np.testing.assert_array_equal(bits(ours), bits(theirs))


def test_devices_that_cannot_share_are_refused(model):
    with pytest.raises(ValueError, match=r"8 experts of a layer evenly, which 3 devices cannot; use 1, 2, 4"):
        model.over(3)
    with pytest.raises(ValueError, match=r"devices must be in 1\.\."):
        model.over(99)
    device = jax.devices()[0]
    with pytest.raises(ValueError, match="each of them once"):
        Partition((device, device), 8)
    with pytest.raises(ValueError, match="together with device"):
        load("shipped", device=device, devices=2)
    with pytest.raises(ValueError, match="together with experts='disk'"):
        load("shipped", experts="disk", devices=2)
    with (
        Engine(model.over(2), config_of(model, 8, "lru")) as engine,
        pytest.raises(ValueError, match="a timeline is of one device, and 2 share the experts"),
    ):
        engine.generate(PROMPTS, timeline="run.json")


@pytest.mark.parametrize("settings", [{"policy": "in-step"}, {"policy": "lru", "numerics": "fast"}])
def test_steps_in_one_program_are_refused_in_words(model, settings):
    with pytest.warns(RuntimeWarning, match="is for a model on one device: several run it layer by layer"):
        engine = Engine(model.over(2), OffloadConfig(device_budget=10 * model.bank.expert_bytes, **settings))
    with engine:
        assert isinstance(engine.runner, ExpertParallel)
