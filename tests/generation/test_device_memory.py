"""`device_budget="auto"`: what is left for experts, and fewer of them when memory runs out all the same."""

import logging
from dataclasses import asdict, replace

import jax
import jax.numpy as jnp
import pytest
from helpers import PROFILE, TINY, copying_by, random_model
from hypothesis import example, given, settings
from hypothesis import strategies as st

from benchmarks.live_bytes import CountedCopies
from layerscope_jax import Engine, OffloadConfig
from layerscope_jax.generation.device_memory import LEAST_MARGIN, device_needs, room_on
from layerscope_jax.generation.fitting import Fitting
from layerscope_jax.models.cache import cache_bytes, new_caches
from layerscope_jax.models.decoder import Between
from layerscope_jax.runtime import build
from layerscope_jax.runtime.in_step import InStepCache
from layerscope_jax.runtime.layerwise import LayerByLayer
from layerscope_jax.runtime.programs import Layers, programs
from layerscope_jax.support import machine

pytestmark = pytest.mark.usefixtures("quick_compiles")

PROMPTS = [[5, 9, 7], [17, 3], list(range(30, 44))]
SETTINGS = {"max_num_seqs": 4, "context": 32, "prefill_chunk_size": 64}


def needs_of(model, **changes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "device_free_bytes", lambda device: 0)
        return room_on(model.device, model, **(SETTINGS | changes)).needs


@pytest.fixture
def fits(monkeypatch):
    """Lets the device have room for so many experts, beside all else."""

    def room(model, experts, **changes):
        total = needs_of(model, **changes).total + experts * model.bank.expert_bytes
        monkeypatch.setattr(machine, "device_free_bytes", lambda device: total)

    return room


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(scope="module")
def expected(model):
    with Engine(model, OffloadConfig(policy="host-only", device_budget=0)) as engine:
        return engine.generate(PROMPTS, max_new_tokens=6).token_ids


@example(seqs=1, context=17, chunk=16, more="prefill_chunk_size", free=0)
@given(
    seqs=st.integers(1, 64),
    context=st.integers(1, 5000),
    chunk=st.integers(16, 4096),
    more=st.sampled_from(["max_num_seqs", "context", "prefill_chunk_size", "device_bytes"]),
    free=st.integers(0, 2**36),
)
@settings(max_examples=60, deadline=None)
def test_needs_grow_with_what_is_asked_for(seqs, context, chunk, more, free):
    asked = {"max_num_seqs": seqs, "context": context, "prefill_chunk_size": chunk, "device_bytes": free}
    fixed = {"itemsize": 2, "expert_bytes": 300, "packed": False}
    needs = device_needs(TINY, **fixed, **asked)
    larger = device_needs(TINY, **fixed, **(asked | {more: 2 * asked[more]}))
    # A prompt that no longer takes several steps needs no cache of its own, in which it is as long as a slot.
    spared = ["newcomers"] if more == "prefill_chunk_size" else []
    assert all(size <= asdict(larger)[part] for part, size in asdict(needs).items() if part not in spared)
    assert larger.newcomers >= cache_bytes(TINY, 1, context, 2)
    assert needs.caches >= cache_bytes(TINY, seqs, context, 2)
    assert needs.newcomers >= cache_bytes(TINY, 1, context, 2)
    assert needs.margin >= LEAST_MARGIN
    assert needs.total == needs.dense + needs.caches + needs.workspace + needs.margin


@pytest.mark.parametrize(("rows", "length", "context"), [(1, 128, 512)])
def test_attention_takes_what_xla_plans(rows, length, context):
    """Scores of a prefill step are most of what its program takes beside arrays that are counted apart."""
    config = replace(TINY, max_position_embeddings=512)
    model = random_model(config)
    tokens, choices, dtype = rows * length, config.experts_per_token, model.bank.dtype
    hidden = jnp.zeros((rows, length, config.hidden_size), dtype)
    written = jnp.zeros((tokens * choices + 1, config.hidden_size), dtype)
    state = Between(hidden, written, jnp.zeros((tokens, choices), jnp.float32))
    caches = new_caches(config, rows, context, dtype, model.device, layers=1)
    program = programs(config, dtype, None).attend_and_route.lower(
        Layers.of(model, config.spans[0]),
        state,
        jnp.zeros((rows, length), jnp.int32),
        caches,
        None,
        None,
        None,
    )
    planned = program.compile().memory_analysis().temp_size_in_bytes
    needs = device_needs(
        config,
        itemsize=4,
        expert_bytes=0,
        packed=False,
        max_num_seqs=rows,
        context=context,
        prefill_chunk_size=tokens,
        device_bytes=0,
    )
    assert 0.5 * needs.attention < planned <= needs.attention + needs.rows


@pytest.mark.parametrize(("policy", "experts"), [("lru", 9), ("lru", 23), ("auto", 5), ("host-only", 0)])
def test_experts_get_what_is_left(policy, experts, model, expected, fits):
    fits(model, experts)
    with Engine(model, OffloadConfig(policy=policy, profile=PROFILE, **SETTINGS)) as engine:
        result = engine.generate(PROMPTS, max_new_tokens=6)
    assert result.token_ids == expected
    assert result.stats.budget_bytes == experts * model.bank.expert_bytes
    assert result.stats.budget_cuts == 0


@pytest.mark.parametrize("experts", [24, 1000, None])
def test_what_fits_is_resident(experts, model, fits):
    """As is everything where the device does not tell its memory, which then is the host's."""
    if experts is not None:
        fits(model, experts)
    with Engine(model, OffloadConfig(**SETTINGS)) as engine:
        assert engine.policy.name == "resident"
        assert engine.budget_bytes == model.bank.total_bytes


def test_it_says_what_takes_the_memory(model, fits, monkeypatch):
    fits(model, 7)
    message = (
        "device_budget is too small for policy 'lru'.*the budget holds only 7.*device_budget='auto' found .* "
        "free, of which 4 requests of 32 positions, in prefill steps of 64 tokens, take .*caches .*rows .*"
        "margin .*; lower max_num_seqs, context or prefill_chunk_size"
    )
    with pytest.raises(ValueError, match=message):
        Engine(model, OffloadConfig(policy="lru", **SETTINGS))
    monkeypatch.setattr(machine, "device_free_bytes", lambda device: 1000)
    with pytest.raises(ValueError, match=r"'auto' finds no room for experts: 1\.0 KiB free") as refused:
        Engine(model, OffloadConfig(**SETTINGS))
    assert str(refused.value).count("device_budget") == 1


@pytest.mark.parametrize("context", [0, 1.5, "long", True])
def test_a_context_is_a_number_of_positions(context):
    with pytest.raises(ValueError, match="context must be 1 or more positions, or None, got"):
        OffloadConfig(context=context)


OUT = "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."


class Full:
    """Stands before parts of an engine: the device's memory runs out at some calls, counted from 0."""

    def __init__(self, at):
        self.at, self.calls, self.array, self.left = at, 0, None, 0

    def check(self):
        self.calls += 1
        if self.calls - 1 in self.at:
            raise jax.errors.JaxRuntimeError(OUT)

    def copy(self, array, sharding):
        """A copy that finds no memory is tried twice more."""
        self.calls += 1
        if self.calls - 1 in self.at:
            self.array, self.left = array, 3
        if array is self.array and self.left:
            self.left -= 1
            raise jax.errors.JaxRuntimeError(OUT)
        return jax.device_put(array, sharding)


def generated(model, at, caplog, where, **options):
    """What an engine generates when memory runs out at some calls of `where`."""
    full = Full(at)
    config = OffloadConfig(**({"policy": "lru"} | SETTINGS | options))
    with pytest.MonkeyPatch.context() as patch, copying_by(full.copy if where == "copy" else jax.device_put):
        if where == "step":
            step = LayerByLayer._decide

            def failing(*arguments):
                full.check()
                return step(*arguments)

            patch.setattr(LayerByLayer, "_decide", failing)
        if where == "preload":
            hold = build.LayerByLayer.preload

            def loading(runner):
                full.check()
                hold(runner)

            patch.setattr(LayerByLayer, "preload", loading)
        with caplog.at_level(logging.WARNING), Engine(model, config) as engine:
            if where == "caches":
                new = engine._loop._new_caches

                def made(*arguments):
                    full.check()
                    return new(*arguments)

                engine._loop._new_caches = made
            result = engine.generate(PROMPTS, max_new_tokens=6)
            assert engine.runner.residency.used_bytes <= engine.budget_bytes
    return result


@pytest.mark.parametrize(("where", "at"), [("step", [7]), ("copy", [4]), ("caches", [0])])
def test_a_step_that_found_no_memory_is_repeated_with_fewer_experts(where, at, model, expected, fits, caplog):
    fits(model, 16)
    result = generated(model, at, caplog, where)
    assert result.token_ids == expected
    assert result.stats.budget_bytes == 14 * model.bank.expert_bytes
    assert result.stats.budget_cuts == 1
    said = [record.message for record in caplog.records]
    assert len(said) == 1
    assert "the device's memory ran out: experts may now take" in said[0]


@pytest.mark.parametrize("lost", [False, True])
def test_a_step_in_one_program_is_repeated_with_fewer_slots(lost, model, expected, fits, monkeypatch, caplog):
    """Memory runs out before the program has taken the slots, or when they are its own already."""
    monkeypatch.setattr(InStepCache, "is_faster_on", staticmethod(lambda device: True))
    slots, layers = 3, model.config.num_moe_layers
    fits(model, model.config.num_experts + slots * layers)
    full, decode, seen = Full([3]), InStepCache.decode, []

    def failing(runner, *arguments):
        seen.append(runner.slots)
        try:
            full.check()
        except jax.errors.JaxRuntimeError:
            if lost:
                jax.tree.map(lambda array: array.delete(), runner.cache)
            raise
        return decode(runner, *arguments)

    monkeypatch.setattr(InStepCache, "decode", failing)
    config = OffloadConfig(policy="in-step", **SETTINGS)
    with caplog.at_level(logging.WARNING), Engine(model, config) as engine:
        before = engine.budget_bytes
        result = engine.generate(PROMPTS, max_new_tokens=6)
        assert result.token_ids == expected
        assert result.stats.mode == "in-step"
        assert result.stats.budget_cuts == 1
        assert engine.budget_bytes < result.stats.peak_expert_bytes <= before
        # What was running is prefilled again, which gives the token of the step that failed.
        assert seen == [slots] * 4 + [slots - 1]
        assert engine.generate(PROMPTS, max_new_tokens=6).stats.peak_expert_bytes <= engine.budget_bytes
    assert "the device's memory ran out: experts may now take" in caplog.text


def test_nothing_holds_the_experts_that_made_room(model, fits, monkeypatch):
    """Neither the error, which knows all frames of the step, nor anything that the engine has."""
    fits(model, 16)
    full, copies, made, alive = Full([5]), CountedCopies(), Fitting._made, []
    with copying_by(copies), Engine(model, OffloadConfig(policy="lru", **SETTINGS)) as engine:
        decide = LayerByLayer._decide

        def failing(runner, *arguments):
            if full.calls == 5:
                alive.append(copies.alive)
            full.check()
            return decide(runner, *arguments)

        def looking(fitting, costs):
            alive.append(copies.alive)
            return made(fitting, costs)

        monkeypatch.setattr(LayerByLayer, "_decide", failing)
        monkeypatch.setattr(Fitting, "_made", looking)
        engine.generate(PROMPTS, max_new_tokens=6)
    assert alive == [16 * model.bank.expert_bytes, 0]


def test_experts_that_do_not_all_fit_after_all_are_not_all_resident(model, expected, fits, caplog):
    fits(model, 1000)
    result = generated(model, [0], caplog, "preload")
    assert result.token_ids == expected
    assert (result.stats.policy, result.stats.budget_cuts) == ("lru", 1)
    assert result.stats.budget_bytes == 21 * model.bank.expert_bytes


def test_a_budget_that_somebody_set_stays(model, fits, caplog):
    fits(model, 16)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        generated(model, [3], caplog, "step", device_budget=16 * model.bank.expert_bytes)
    assert not caplog.records
