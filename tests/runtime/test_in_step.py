"""The cache of experts inside the decode step: right whatever is resident, and one program a step."""

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest
from compiled_programs import compiled
from helpers import TINY, random_model

from layerscope_jax import Engine, OffloadConfig
from layerscope_jax.kernels.xla_ffi import Unavailable
from layerscope_jax.models.experts import ExpertBody
from layerscope_jax.offload.fills import by_warp
from layerscope_jax.runtime import build as building
from layerscope_jax.runtime import in_step
from layerscope_jax.scheduling import in_step as scheduled

pytestmark = pytest.mark.usefixtures("quick_compiles")

PROMPTS = [[1, 2, 3], list(range(16)), [9], [4, 5]]


@pytest.fixture(autouse=True)
def _accelerator(monkeypatch):
    """What is for accelerators alone, on a CPU."""
    monkeypatch.setattr(in_step.InStepCache, "is_faster_on", staticmethod(lambda device: True))


STREAMED = TINY.num_experts
"""Slots of the room through which prefills stream."""


@functools.cache
def model():
    return random_model(seed=12)


@functools.cache
def answers():
    """Of the engine that has all experts."""
    with Engine(model()) as engine:
        return engine.generate(PROMPTS, max_new_tokens=12).token_ids


def config_of(model, share, **others):
    """A budget of so many slots for each layer."""
    slots = STREAMED + share * model.config.num_moe_layers
    others = {"policy": "in-step", "max_num_seqs": 4} | others
    return OffloadConfig(device_budget=slots * model.bank.expert_bytes, **others)


def logprobs(share, **others):
    with Engine(model(), config_of(model(), share, **others)) as engine:
        result = engine.generate(PROMPTS, max_new_tokens=12, logprobs=2)
        assert (result.stats.mode, result.stats.policy) == ("in-step", "in-step")
        assert result.token_ids == answers()
        assert result.stats.peak_expert_bytes <= engine.budget_bytes
        return [[token.logprob for token in completion.logprobs] for completion in result], result.stats


def test_all_budgets_give_the_same_bits():
    """Of two requests' four experts three have slots and take turns, or all, or there are some to spare."""
    few, moved = logprobs(3, max_num_seqs=2)
    many, kept = logprobs(5, max_num_seqs=2)
    assert logprobs(4, max_num_seqs=2)[0] == few
    assert few == many
    assert moved.bytes_demand > kept.bytes_demand > 0
    assert moved.hit_rate < kept.hit_rate < 1


def test_one_slot_a_layer_is_enough():
    assert logprobs(1, max_num_seqs=1)[1].hit_rate < 0.5


@pytest.mark.parametrize(
    ("format", "changes"),
    [
        ("int8", {}),
        ("int4", {}),
        ("float32", {"expert_body": ExpertBody("clamped", bias=True)}),
        ("float32", {"dense_layers": (0,), "intermediate_size": 24, "num_layers": 3}),
    ],
    ids=["int8", "int4", "biases", "dense layers between"],
)
def test_experts_of_other_kinds(format, changes):
    hidden = {"moe_intermediate_size": 32} if format == "int4" else {}
    other = random_model(**({"num_layers": 2, "seed": 3} | hidden | changes))
    with Engine(other, OffloadConfig(expert_format=format)) as engine:
        expected = engine.generate(PROMPTS, max_new_tokens=8).token_ids
    with Engine(other, OffloadConfig(expert_format=format)) as engine:
        size = engine.model.bank.expert_bytes
    slots = STREAMED + 3 * other.config.num_moe_layers
    config = OffloadConfig(device_budget=slots * size, policy="in-step", expert_format=format, max_num_seqs=4)
    with Engine(other, config) as engine:
        result = engine.generate(PROMPTS, max_new_tokens=8)
        assert result.stats.mode == "in-step"
        assert result.token_ids == expected


def test_requests_that_join_and_leave():
    """Batches of every size, and sampling, with the cache going on."""
    settings = {"max_new_tokens": 9, "temperature": 0.8, "seed": 5}
    config = replace(config_of(model(), 3), max_num_seqs=2)
    with Engine(model(), OffloadConfig(max_num_seqs=2)) as engine:
        expected = engine.generate(PROMPTS, **settings).token_ids
    with Engine(model(), config) as engine:
        assert engine.generate(PROMPTS, **settings).token_ids == expected
        assert engine.generate(PROMPTS[::-1], max_new_tokens=12).token_ids == answers()[::-1]


def test_a_step_is_one_program_whose_slots_stay_where_they_are():
    """No pool is copied: those of a step lie where those of the step before did."""
    with Engine(model(), config_of(model(), 3)) as engine:
        engine.generate(PROMPTS, max_new_tokens=3)
        runner = engine.runner
        places = [array.unsafe_buffer_pointer() for array in jax.tree.leaves(runner.cache.pools)]
        before, ran = len(compiled), []
        decode = runner._decode

        def counted(*arguments):
            ran.append(len(arguments))
            return decode(*arguments)

        runner._decode = counted
        result = engine.generate(PROMPTS, max_new_tokens=12)
        assert result.token_ids == answers()
        assert len(ran) == 11  # the first tokens come from the prefill
        assert len(compiled) == before
        assert [a.unsafe_buffer_pointer() for a in jax.tree.leaves(runner.cache.pools)] == places


def test_warming_up_changes_nothing_and_leaves_nothing_to_compile():
    with Engine(model(), config_of(model(), 3)) as engine:
        engine.generate([[7, 8]] * 4, max_new_tokens=4)
        held = jax.tree.map(np.asarray, engine.runner.cache)
        engine.warmup(prompt_tokens=16, new_tokens=12)
        jax.tree.map(np.testing.assert_array_equal, engine.runner.cache, held)
        before = len(compiled)
        engine.generate([list(range(16))] * 4, max_new_tokens=12)
        assert len(compiled) == before


def test_recorded_steps_are_planned_layer_by_layer():
    with Engine(model(), config_of(model(), 3)) as engine:
        result = engine.generate(PROMPTS, max_new_tokens=12, record_plans=True)
        assert result.token_ids == answers()
        assert len(result.plans) == 12 * 3
        assert engine.generate(PROMPTS, max_new_tokens=12).token_ids == answers()


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, RuntimeError("out of memory")], ids=["ctrl-c", "failure"]
)
def test_after_a_step_that_failed_the_next_call_is_right(error):
    """Its slots are lost with it, since they are the step's own: they are filled anew."""
    with Engine(model(), config_of(model(), 3)) as engine:
        runner, decode = engine.runner, engine.runner._decode
        calls = []

        def failing(*arguments):
            calls.append(decode(*arguments))
            if len(calls) == 4:
                raise error
            return calls[-1]

        runner._decode = failing
        with pytest.raises(error if isinstance(error, type) else type(error)):
            engine.generate(PROMPTS, max_new_tokens=12)
        assert runner.resident_experts == len(runner.residency.resident)
        assert engine.generate(PROMPTS, max_new_tokens=12).token_ids == answers()


def test_an_interrupt_between_steps_loses_no_expert():
    with Engine(model(), config_of(model(), 5)) as engine:
        engine.generate(PROMPTS, max_new_tokens=12)
        held = engine.runner.resident_experts

        def stop(token):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            engine.generate(PROMPTS, max_new_tokens=12, on_token=stop)
        assert engine.runner.resident_experts >= held
        assert engine.generate(PROMPTS, max_new_tokens=12).token_ids == answers()


def test_where_nothing_fills_slots_python_plans(monkeypatch):
    def nothing(device):
        raise Unavailable("no fill on this device")

    monkeypatch.setattr(building, "fill_for", nothing)
    with pytest.warns(RuntimeWarning, match="layer by layer.*no fill on this device"):
        engine = Engine(model(), config_of(model(), 3))
    with engine:
        result = engine.generate(PROMPTS, max_new_tokens=12)
        assert (result.stats.mode, result.token_ids) == ("layers", answers())


def test_a_budget_for_less_than_a_slot_a_layer_is_refused():
    slots = STREAMED + 1
    with pytest.raises(ValueError, match=r"policy 'in-step': it keeps 8 slots.*11 together.*holds 9 experts"):
        Engine(model(), OffloadConfig(device_budget=slots * model().bank.expert_bytes, policy="in-step"))


def test_a_closed_engine_says_so():
    engine = Engine(model(), config_of(model(), 3))
    runner = engine.runner
    engine.close()
    with pytest.raises(ValueError, match="make a new Engine"):
        engine.generate(PROMPTS)
    assert runner.cache is None


def test_the_gpus_fill_gives_the_same_bits(monkeypatch):
    """The kernel that reads host memory by address, run on a CPU."""
    pytest.importorskip("warp")
    expected, _ = logprobs(3)
    monkeypatch.setattr(building, "fill_for", lambda device: by_warp())
    in_step.decode_program.cache_clear()
    assert logprobs(3)[0] == expected


def test_on_a_cpu_steps_are_planned_layer_by_layer(monkeypatch):
    """With the bits of every other policy there, and within budgets for less than a slot a layer."""
    monkeypatch.undo()
    config = OffloadConfig(device_budget=STREAMED * model().bank.expert_bytes, policy="in-step")
    with Engine(model(), config) as engine:
        result = engine.generate(PROMPTS, max_new_tokens=12)
    assert (result.stats.mode, result.token_ids) == ("layers", answers())


def test_a_prefill_copies_the_next_layer_while_one_is_computed(monkeypatch):
    """Where the room through which it streams holds two."""
    monkeypatch.setattr(scheduled, "streamed_layers", lambda geometry: 2)
    slots = 2 * STREAMED + 2 * model().config.num_moe_layers
    config = OffloadConfig(device_budget=slots * model().bank.expert_bytes, policy="in-step", max_num_seqs=4)
    with Engine(model(), config) as engine:
        assert engine.runner.residency.slots == 2 * STREAMED
        result = engine.generate(PROMPTS, max_new_tokens=12, record_plans=True)
    assert result.token_ids == answers()
    ahead = [len(plan.prefetch) for plan in result.plans]
    assert sum(ahead) > STREAMED
    assert result.stats.peak_expert_bytes <= engine.budget_bytes
