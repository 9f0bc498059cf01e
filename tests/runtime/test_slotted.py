"""Experts of an accelerator in slots: right whatever is moved, and few dispatches a layer."""

from collections import Counter

import numpy as np
import pytest
from compiled_programs import compiled
from exact_cases import RandomPolicy
from helpers import PROFILE, random_model

from layerscope_jax import Engine, ExpertId, OffloadConfig
from layerscope_jax.offload import executors, slotted
from layerscope_jax.offload.executors import place_rows
from layerscope_jax.offload.slotted import SlottedExperts
from layerscope_jax.runtime import device_side, layerwise
from layerscope_jax.scheduling.caching import LRU

pytestmark = pytest.mark.usefixtures("quick_compiles")

PROMPTS = [[1, 2, 3], list(range(16))]


@pytest.fixture(autouse=True)
def _accelerator(monkeypatch):
    monkeypatch.setattr(device_side, "device_experts", lambda device, cpu: SlottedExperts(device, cpu.format))


@pytest.fixture(scope="module")
def model():
    return random_model(seed=12)


@pytest.fixture(scope="module")
def answers(model):
    with Engine(model) as engine:
        return engine.generate(PROMPTS, max_new_tokens=12).token_ids


def config_of(model, slots, policy, **others):
    size = model.bank.expert_bytes
    return OffloadConfig(device_budget=slots * size, policy=policy, profile=PROFILE, **others)


@pytest.mark.parametrize("slots", [8, 15])
@pytest.mark.parametrize("policy", ["lru", "fiddler", "presched", "random"])
def test_tokens_are_those_of_the_resident_model(model, answers, policy, slots):
    chosen = RandomPolicy() if policy == "random" else policy
    with Engine(model, config_of(model, slots, chosen)) as engine:
        assert isinstance(engine.runner.device_experts, SlottedExperts)
        engine.runner.transfers.most_staged = 2  # as beside slots that fill the rest of a budget
        for _ in range(2):
            assert engine.generate(PROMPTS, max_new_tokens=12).token_ids == answers
        held, experts = engine.runner.residency, engine.runner.device_experts
        slot_of = {ExpertId(*expert): held.use(expert[0], [expert[1]])[0] for expert in list(held.resident)}
        assert len(set(slot_of.values())) == len(slot_of) <= slots
        for expert, slot in slot_of.items():
            for array, view in zip(experts._pool, model.bank.views(expert), strict=True):
                np.testing.assert_array_equal(array[slot], view)
        assert sorted([*experts._free, *slot_of.values()]) == list(range(slots))


def test_budgets_chunks_and_arrivals_change_no_token_of_packed_experts():
    """What arrives late in a decode step, and an expert's tiles in several dispatches, among it."""
    stored = random_model(seed=4, num_layers=2, hidden_size=32, moe_intermediate_size=32).with_format("int4")
    prompts = [*PROMPTS, list(range(40))]
    with Engine(stored) as engine:
        expected = engine.generate(prompts, max_new_tokens=8).token_ids
    for slots, chunk in ((5, 16), (14, 4096)):
        config = config_of(stored, slots, RandomPolicy(device=0.8), prefill_chunk_size=chunk)
        with Engine(stored, config) as engine:
            assert engine.generate(prompts, max_new_tokens=8).token_ids == expected


def test_a_layer_with_nothing_to_load_is_two_dispatches_and_one_array_to_read(model, answers, monkeypatch):
    """The router's, and the experts', which is begun before the routing is read. Nothing else goes over."""
    calls: Counter[str] = Counter()

    def counted(name, function):
        def call(*arguments, **named):
            calls[name] += 1
            return function(*arguments, **named)

        return call

    with Engine(model, config_of(model, 24, LRU())) as engine:  # an object, which is asked all the same
        for _ in range(3):
            engine.generate(PROMPTS, max_new_tokens=12)
        for name in ("resident_rows", "tiled_slots", "put"):
            monkeypatch.setattr(slotted, name, counted(name, getattr(slotted, name)))
        monkeypatch.setattr(executors, "place_rows", counted("place_rows", executors.place_rows))
        monkeypatch.setattr(layerwise, "read", counted("read", layerwise.read))
        attend = counted("attend", engine.runner.dense.attend_alone)
        monkeypatch.setattr(engine.runner.dense, "attend_alone", attend)
        result = engine.generate([PROMPTS[0]], max_new_tokens=12)
        assert result.token_ids == answers[:1]
        prefill, decode = 3, 11 * 3
        assert calls.pop("tiled_slots") == prefill  # three tokens are few tiles
        assert calls == {"attend": prefill + decode, "read": prefill + decode, "resident_rows": decode}
        assert result.stats.hit_rate == 1


def test_rows_of_the_host_are_one_array_into_the_next_program(model, answers, monkeypatch):
    """They are no dispatch of their own in a decode step, and how many they are compiles nothing."""
    placed: list[int] = []
    monkeypatch.setattr(executors, "place_rows", lambda *some: placed.append(0) or place_rows(*some))
    with Engine(model, config_of(model, 0, "host-only")) as engine:
        assert engine.generate(PROMPTS, max_new_tokens=12).token_ids == answers
    assert len(placed) == 3  # of the prefill
    with Engine(model, config_of(model, 9, RandomPolicy())) as engine:
        engine.warmup(prompt_tokens=16, max_num_seqs=2, new_tokens=12)
        before = len(compiled)
        for prompts in (PROMPTS, [[7], [8, 9]]):
            engine.generate(prompts, max_new_tokens=12)
        assert len(compiled) == before


def test_pools_stay_where_they_are_and_a_long_decode_compiles_nothing_more(model, answers):
    with Engine(model, config_of(model, 9, "lru")) as engine:
        engine.generate(PROMPTS, max_new_tokens=12)
        experts = engine.runner.device_experts
        places = [array.unsafe_buffer_pointer() for array in experts._pool]
        before = len(compiled)
        assert engine.generate(PROMPTS, max_new_tokens=12).token_ids == answers
        assert [array.unsafe_buffer_pointer() for array in experts._pool] == places
        assert len(compiled) == before


def test_an_interrupt_that_loses_the_slots_costs_time_alone(model, answers, monkeypatch):
    """Between the program that was given them and the name that is to hold its result."""
    with Engine(model, config_of(model, 9, "lru")) as engine:
        engine.generate(PROMPTS, max_new_tokens=4)
        real = slotted.put

        def interrupted(*arguments):
            real(*arguments)
            raise KeyboardInterrupt

        monkeypatch.setattr(slotted, "put", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate([[5, 4, 3, 2, 1]], max_new_tokens=12)
        monkeypatch.setattr(slotted, "put", real)
        assert not engine.runner.device_experts.lost
        assert engine.generate(PROMPTS, max_new_tokens=12).token_ids == answers
