"""Policy "auto" on an accelerator: decode steps in two ways, of which one has the device's memory."""

import functools
import random

import jax
import pytest
from compiled_programs import compiled
from helpers import PROFILE, TINY, random_model

from layerscope_jax import Engine, OffloadConfig
from layerscope_jax.kernels.xla_ffi import Unavailable
from layerscope_jax.offload.slotted import SlottedExperts
from layerscope_jax.runtime import alternating, device_side, in_step
from layerscope_jax.runtime.accounts import Account
from layerscope_jax.runtime.alternating import Alternating
from layerscope_jax.runtime.layerwise import LayerByLayer
from layerscope_jax.scheduling.contest import Contest
from layerscope_jax.scheduling.guard import Guard

pytestmark = pytest.mark.usefixtures("quick_compiles")

PROMPTS = [[1, 2, 3], list(range(16)), [9], [4, 5]]
SLOTS = TINY.num_experts + 3 * TINY.num_layers
"""A layer through which prefills stream, and three slots for each."""


@pytest.fixture(autouse=True)
def _accelerator(monkeypatch):
    """What is for accelerators alone, on a CPU."""
    monkeypatch.setattr(in_step.InStepCache, "is_faster_on", staticmethod(lambda device: True))
    monkeypatch.setattr(device_side, "device_experts", lambda device, cpu: SlottedExperts(device, cpu.format))


@functools.cache
def model():
    return random_model(seed=12)


@functools.cache
def answers():
    """Of the engine that has all experts."""
    with Engine(model()) as engine:
        return engine.generate(PROMPTS, max_new_tokens=12).token_ids


def config_of(slots=SLOTS, **others):
    others = {"policy": "auto", "max_num_seqs": 4, "profile": PROFILE} | others
    return OffloadConfig(device_budget=slots * model().bank.expert_bytes, **others)


def decided(monkeypatch, ways):
    """Makes decode steps go the given ways in turn: true for the cache inside."""
    coming = iter(ways)
    monkeypatch.setattr(alternating, "after", lambda *_: Contest(in_step=next(coming)))


def owners(runner):
    """Which of the two runners have arrays of experts."""
    pool = runner._layers.device_experts._pool
    room = runner._in_step.device_experts._pool
    assert (room is None) == (runner._in_step.cache is None)
    return pool is not None, room is not None


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_changed_tokens_and_budget_stay(monkeypatch, seed):
    draw = random.Random(seed)
    decided(monkeypatch, (draw.random() < 0.5 for _ in range(1000)))
    with Engine(model(), config_of()) as engine:
        assert isinstance(engine.runner, Alternating)
        for _ in range(2):
            result = engine.generate(PROMPTS, max_new_tokens=12)
            assert result.token_ids == answers()
            assert result.stats.peak_expert_bytes <= engine.budget_bytes
            assert sorted(owners(engine.runner)) == [False, True]
        shares = result.stats.ways["decode"]
        assert 0 < shares["in-step"] < 1
        assert sum(shares.values()) == pytest.approx(1)
    assert owners(engine.runner) == (False, False)


def test_it_measures_and_keeps_what_is_faster(monkeypatch):
    """On a clock that says the cache inside takes half as long."""
    now = [0.0]
    monkeypatch.setattr(alternating.time, "perf_counter", lambda: now[0])
    with Engine(model(), config_of()) as engine:
        runner = engine.runner
        runner._contest = Contest(left=4, spent_s=100.0)
        for each, took_s in ((runner._layers, 0.02), (runner._in_step, 0.01)):

            def step(*inputs, run=each.step, took_s=took_s):
                now[0] += took_s
                return run(*inputs)

            monkeypatch.setattr(each, "step", step)
        for _ in range(4):
            result = engine.generate(PROMPTS, max_new_tokens=12)
            assert result.token_ids == answers()
        assert runner.in_step
        assert (result.stats.mode, result.stats.policy) == ("in-step", "auto")


def test_warming_up_leaves_nothing_to_compile_in_either_way(monkeypatch):
    decided(monkeypatch, [True, False] * 500)
    with Engine(model(), config_of()) as engine:
        engine.warmup(prompt_tokens=16, new_tokens=12)
        before = len(compiled)
        for _ in range(2):
            engine.generate([list(range(16))] * 4, max_new_tokens=12)
        assert len(compiled) == before
        held = engine.runner.resident_experts
        engine.warmup(prompt_tokens=16, new_tokens=12)  # again, which moves nothing
        assert engine.runner.resident_experts == held > 0


def test_what_has_not_been_compiled_is_not_taken_for_it(monkeypatch):
    """Sampling is another program: a minute of steps comes before a trial of it."""
    asked = []
    monkeypatch.setattr(alternating, "after", lambda *inputs: asked.append(inputs[-1]) or Contest(left=1))
    with Engine(model(), config_of()) as engine:
        engine.warmup(prompt_tokens=16, max_num_seqs=4, new_tokens=12)
        engine.runner._contest = Contest(left=1)
        engine.generate(PROMPTS, max_new_tokens=2)
        engine.generate(PROMPTS, max_new_tokens=2, temperature=0.5)
    assert asked == [True, False]


def test_recorded_calls_are_planned_by_auto_and_are_no_contest(monkeypatch):
    decided(monkeypatch, [True] * 500)
    with Engine(model(), config_of()) as engine:
        assert engine.generate(PROMPTS, max_new_tokens=12).stats.mode == "in-step"
        contest = engine.runner._contest
        result = engine.generate(PROMPTS, max_new_tokens=12, record_plans=True, bound=True)
        assert result.token_ids == answers()
        assert len(result.plans) == 12 * 3
        assert any(plan.host for plan in result.plans)
        assert result.stats.share_of_bound is not None
        assert (result.stats.mode, result.stats.predictor) == ("layers", "gate")
        assert engine.runner._contest is contest
        assert engine.generate(PROMPTS, max_new_tokens=12).stats.mode == "in-step"


@pytest.mark.parametrize(
    "error", [RuntimeError("a fill that fails"), RuntimeError("RESOURCE_EXHAUSTED")], ids=str
)
@pytest.mark.parametrize("place", ["decode", "reserve"])
def test_a_way_that_fails_is_tried_once(monkeypatch, error, place):
    """The call that it failed in says so; all later ones go the other way."""
    decided(monkeypatch, [True] * 500)
    whole = getattr(in_step.InStepCache, place)

    def failing(runner, *arguments):
        if place == "reserve" and not arguments[0]:  # which lets go of the memory
            return whole(runner, *arguments)
        raise error

    with Engine(model(), config_of()) as engine:
        monkeypatch.setattr(in_step.InStepCache, place, failing)
        with pytest.raises(RuntimeError, match=str(error)):
            engine.generate(PROMPTS, max_new_tokens=12)
        for _ in range(2):
            result = engine.generate(PROMPTS, max_new_tokens=12)
            assert (result.token_ids, result.stats.mode) == (answers(), "layers")
        assert owners(engine.runner) == (True, False)


def test_a_way_that_cannot_be_rehearsed_is_not_tried(monkeypatch):
    decided(monkeypatch, [True] * 500)
    with Engine(model(), config_of()) as engine:

        def failing(*arguments):
            raise RuntimeError("RESOURCE_EXHAUSTED")

        monkeypatch.setattr(engine.runner._in_step, "_decode", failing)
        engine.warmup(prompt_tokens=16, new_tokens=12)
        result = engine.generate(PROMPTS, max_new_tokens=12)
        assert (result.token_ids, result.stats.mode) == (answers(), "layers")


def test_the_most_that_was_held_is_remembered_through_changes(monkeypatch):
    decided(monkeypatch, [True, True, False] * 500)
    with Engine(model(), config_of()) as engine:
        found = [engine.generate(PROMPTS, max_new_tokens=12).stats.peak_expert_bytes for _ in range(2)]
        slots = engine.runner._in_step.slot_bytes
        assert all(slots <= peak <= engine.budget_bytes for peak in found)
    with Engine(model(), config_of()) as engine:
        runner, account = engine.runner, Account()
        runner.reset(account)
        for _ in range(2):  # there and back, where nothing is held
            runner._change()
        assert runner.stats(account).peak_expert_bytes == slots


def test_copies_under_way_belong_to_the_one_that_asked(monkeypatch):
    """Also where prefills copy the next layer ahead, over a slow link."""
    draw = random.Random(1)
    decided(monkeypatch, (draw.random() < 0.5 for _ in range(5000)))
    deep = random_model(seed=3, num_layers=12)
    with Engine(deep) as engine:
        expected = engine.generate(PROMPTS, max_new_tokens=6).token_ids
    settings = {"policy": "auto", "max_num_seqs": 4, "profile": PROFILE, "emulated_link_bandwidth": "3MB"}
    budget = (10 * deep.config.num_experts + 12) * deep.bank.expert_bytes
    with Engine(deep, OffloadConfig(device_budget=budget, **settings)) as engine:
        assert engine.runner._in_step.residency.slots >= 2 * deep.config.num_experts
        found = engine.runner
        for _ in range(6):
            assert engine.generate(PROMPTS, max_new_tokens=6).token_ids == expected
            assert not found._beside(found._now).residency.idle_prefetches  # it has no experts at all


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("RESOURCE_EXHAUSTED")], ids=type)
@pytest.mark.parametrize("moment", range(7))
def test_a_change_that_is_cut_off_is_made_up_for(monkeypatch, error, moment):
    """Wherever it is: before and after each of the two gives up its memory, and while one takes it."""
    decided(monkeypatch, [True, False] * 500)
    with Engine(model(), config_of()) as engine:
        count = [0]

        def cut(function):
            def call(*arguments, **named):
                for late in (False, True):
                    count[0] += 1
                    if count[0] == moment + 1:
                        raise error
                    if not late:
                        result = function(*arguments, **named)
                return result

            return call

        with monkeypatch.context() as patched:
            patched.setattr(alternating, "vacate", cut(alternating.vacate))
            patched.setattr(device_side.DeviceSide, "occupy", cut(device_side.DeviceSide.occupy))
            patched.setattr(in_step.Cache, "empty", cut(in_step.Cache.empty))
            with pytest.raises(type(error)):
                engine.generate(PROMPTS, max_new_tokens=12)
        assert engine.generate(PROMPTS, max_new_tokens=12).token_ids == answers()
        assert sorted(owners(engine.runner)) == [False, True]
        result = engine.generate(PROMPTS, max_new_tokens=12)
        assert result.token_ids == answers()
        assert result.stats.peak_expert_bytes <= engine.budget_bytes


@pytest.mark.parametrize(
    ("slots", "others"),
    [(TINY.num_experts, {}), (SLOTS, {"policy": Guard()})],
    ids=["small budget", "object"],
)
def test_where_it_is_not_possible_or_not_asked_for_steps_are_planned(slots, others):
    with Engine(model(), config_of(slots, **others)) as engine:
        assert type(engine.runner) is LayerByLayer
        assert engine.generate(PROMPTS, max_new_tokens=12).token_ids == answers()


def test_where_nothing_fills_slots_nobody_is_told(monkeypatch):
    """Who asked for "auto" asked for no way in particular."""

    def nothing(device):
        raise Unavailable("no fill on this device")

    monkeypatch.setattr(alternating, "fill_for", nothing)
    with Engine(model(), config_of()) as engine:
        assert type(engine.runner) is LayerByLayer


def test_the_memory_of_one_is_free_for_the_other(monkeypatch):
    """After a change, no array of an expert is left beside those of the runner that runs."""
    decided(monkeypatch, [True] * 500)
    with Engine(model(), config_of()) as engine:
        engine.generate(PROMPTS, max_new_tokens=12)
        before = len(jax.live_arrays())
        for _ in range(3):
            engine.runner._change()
            engine.runner._change()
        assert len(jax.live_arrays()) <= before
