"""How many programs an engine compiles: few, and none again."""

from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from compiled_programs import compiled
from exact_cases import RandomPolicy
from helpers import PROFILE, PROMPTS, one_jit, random_model, spelling_model

from layerscope_jax import Engine, OffloadConfig, PolicyBase, Replay
from layerscope_jax.kernels.grouping import possible_groups
from layerscope_jax.offload.slotted import SlottedExperts
from layerscope_jax.runtime import device_side

pytestmark = pytest.mark.usefixtures("quick_compiles")  # what is counted is how many, not what they do


@pytest.fixture(scope="module")
def model():
    return spelling_model()


@contextmanager
def compiling():
    """What comes out counts the programs compiled within."""
    before, counted = len(compiled), []
    yield counted
    counted.append(len(compiled) - before)


@pytest.mark.parametrize("policy", ["host-only", "resident", "whole"])
def test_generating_again_compiles_nothing(model, policy):
    config = {
        "host-only": OffloadConfig(device_budget=0, policy="host-only"),
        "resident": OffloadConfig(),
        "whole": OffloadConfig(numerics="fast"),
    }[policy]
    with one_jit(policy == "whole"), Engine(model, config) as engine:
        first = engine.generate(PROMPTS, max_new_tokens=10)
        with compiling() as counted:
            assert engine.generate(PROMPTS, max_new_tokens=10).token_ids == first.token_ids
    assert counted == [0]


@pytest.mark.parametrize(
    "config",
    [OffloadConfig(device_budget=0, policy="host-only"), OffloadConfig(numerics="fast")],
    ids=["layers", "whole"],
)
def test_another_engine_of_the_model_compiles_nothing(model, config):
    with one_jit():
        with Engine(model, config) as engine:
            engine.generate(PROMPTS, max_new_tokens=3)
        with compiling() as counted, Engine(model, config) as engine:
            engine.generate(PROMPTS, max_new_tokens=3)
    assert counted == [0]


class SparingPolicy(RandomPolicy, PolicyBase):
    """Wants a forecast every other time."""

    uses_forecasts = spares_forecasts = True
    predictor = "gate"

    asked = 0

    def wants_forecast(self, state):
        self.asked += 1
        return self.asked % 2 == 1


@pytest.mark.parametrize("policy", [RandomPolicy, SparingPolicy])
def test_a_whole_generation_compiles_three_programs_for_each_bucket_and_phase(policy, monkeypatch):
    """On an accelerator, however tokens are routed, experts arrive and prompts are cut."""
    monkeypatch.setattr(device_side, "device_experts", lambda device, cpu: SlottedExperts(device, cpu.format))
    own = 24 if policy is RandomPolicy else 28  # a shape of its own
    model = random_model(num_layers=2, hidden_size=own, head_dim=6, seed=9)
    config = OffloadConfig(
        device_budget=9 * model.bank.expert_bytes,
        policy=policy(device=0.7),
        prefill_chunk_size=32,
        max_num_seqs=2,
    )
    prompts = [[(7 * row + 3 * n) % 61 for n in range(size)] for row, size in enumerate((70, 5, 20, 33, 2))]
    shapes, before = set(), len(compiled)
    with Engine(model, config) as engine:
        step = engine.runner.step

        def seen(tokens, positions, last, caches, sampling):
            shapes.add((*tokens.shape, *jax.tree.leaves(caches)[0].shape))
            return step(tokens, positions, last, caches, sampling)

        monkeypatch.setattr(engine.runner, "step", seen)
        answers = engine.generate(prompts, max_new_tokens=20).token_ids
        found = Counter(compiled[before:])
        assert {shape[1] > 1 for shape in shapes} == {True, False}
        assert len({shape[:2] for shape in shapes}) > 2  # several sizes of chunks
        phases = {(shape[0] * shape[1], shape[1] > 1) for shape in shapes}
        prefills = sum(prefill for _, prefill in phases)
        assert found["tiled_slots"] == found["place_rows"] == prefills
        assert found["resident_rows"] == len(phases) - prefills
        decodes = sum(shape[1] == 1 for shape in shapes)
        assert found["attend_and_route"] == len(shapes) + (decodes if policy is SparingPolicy else 0)
        layers = ("attend_and_route", "tiled_slots", "place_rows", "resident_rows")
        assert sum(found[name] for name in layers) <= 3 * len(shapes)
        before = len(compiled)
        for seed in (1, 2):
            engine.runner.policy.seed = seed  # other experts are moved, and computed elsewhere
            assert engine.generate(prompts, max_new_tokens=20).token_ids == answers
        assert compiled[before:] == []


OTHERS = 17
"""Programs beside those of experts: embedding, finishing, and attending with a forecast and without, for two
phases; empty caches and rows, on each device; and six that only fill or convert an array, where no test
before has compiled them."""


def rows_of_experts(model, batch, prompt_tokens):
    """Shapes of dispatches of both phases."""
    config = model.config
    return sum(
        len(possible_groups(tokens, config.experts_per_token, config.num_experts))
        for tokens in (batch * prompt_tokens, batch)
    )


def small_model(dtype=jnp.float32):
    return random_model(num_layers=2, hidden_size=28, num_experts=5, seed=3, dtype=dtype)


def random_prompts(seed, batch, prompt_tokens):
    """Prompts, the first of the full length, the others up to it."""
    lengths = [prompt_tokens] + [1 + (seed * 7 + row * 5) % prompt_tokens for row in range(1, batch)]
    return [[(seed + row * 31 + n * 17) % 61 for n in range(size)] for row, size in enumerate(lengths)]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_after_a_warm_up_the_whole_model_compiles_nothing(temperature):
    model = random_model(num_layers=1, hidden_size=20, num_heads=2, head_dim=10, num_kv_heads=1)
    with one_jit(), Engine(model, OffloadConfig(numerics="fast")) as engine:
        found = engine.warmup(max_num_seqs=3, prompt_tokens=18, new_tokens=4, temperature=temperature)
        # A prefill and a decode step; empty caches of two lengths and what is in them; rows put into slots;
        # settings of sampling are arrays of two types. Small programs may be there from another test.
        assert 2 <= found.programs <= 2 + 3 + 1 + (2 if temperature else 0)
        with compiling() as counted:
            result = engine.generate(random_prompts(1, 3, 18), max_new_tokens=4, temperature=temperature)
        assert counted == [0]
        assert result.stats.device_share < 1
        assert (
            engine.warmup(max_num_seqs=3, prompt_tokens=18, new_tokens=4, temperature=temperature).programs
            == 0
        )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"logprobs": 2},
        {"repetition_penalty": 1.1, "logprobs": 0},
        {"temperature": 0.7, "n": 3},
        {"temperature": 0.7, "min_p": 0.1, "frequency_penalty": 0.5},
    ],
    ids=str,
)
def test_after_a_warm_up_what_is_resident_compiles_nothing(settings):
    with Engine(small_model()) as engine:
        engine.warmup(max_num_seqs=3, prompt_tokens=18, new_tokens=4, **settings)
        prompts = [[1] * 18] if "n" in settings else [[1] * 18, [2] * 5, [3]]
        with compiling() as counted:
            engine.generate(prompts, max_new_tokens=4, stop_token_ids=(), **settings)
        assert counted == [0]


def test_a_warm_up_is_for_the_settings_that_the_checkpoint_recommends():
    recommended = {"temperature": 0.7, "repetition_penalty": 1.1}
    with Engine(replace(small_model(), generation_defaults=recommended)) as engine:
        engine.warmup(max_num_seqs=3, prompt_tokens=18, new_tokens=4)
        with compiling() as counted:
            engine.generate([[1] * 18, [2], [3]], max_new_tokens=4, stop_token_ids=())
        assert counted == [0]


@pytest.mark.parametrize(
    ("policy", "dtype"),
    [
        ("resident", jnp.float16),
        ("auto", jnp.float32),
    ],
)
def test_after_a_warm_up_no_layer_compiles_anything(policy, dtype):
    model = small_model(dtype)
    config = OffloadConfig(
        device_budget=None if policy == "resident" else 6 * model.bank.expert_bytes,
        policy=policy,
        profile=PROFILE,
    )
    batch, length = 2, 18
    with Engine(model, config) as engine:
        found = engine.warmup(max_num_seqs=batch, prompt_tokens=length, new_tokens=6)
        # Where the device is a CPU, only float16 goes by XLA's products.
        experts = 2 * rows_of_experts(model, batch, length) if dtype == jnp.float16 else 0
        assert found.programs <= experts + OTHERS
        with compiling() as counted:
            for seed in range(3):
                engine.generate(random_prompts(seed, batch, length), max_new_tokens=6)
        assert counted == [0]


def test_after_a_warm_up_an_accelerator_compiles_nothing(monkeypatch):
    """With few experts on the device: in some steps there is none."""
    monkeypatch.setattr(device_side, "device_experts", lambda device, cpu: SlottedExperts(device))
    model = random_model(num_layers=2, hidden_size=36, dtype=jnp.bfloat16)
    config = OffloadConfig(device_budget=10 * model.bank.expert_bytes, policy=RandomPolicy(device=0.2))
    batch, length = 2, 10
    with Engine(model, config) as engine:
        found = engine.warmup(max_num_seqs=batch, prompt_tokens=length, new_tokens=8)
        assert found.programs <= 2 + 1 + OTHERS  # experts and rows of the host, and experts of a decode step
        with compiling() as counted:
            for seed in range(4):
                engine.generate(random_prompts(seed, batch, length), max_new_tokens=8)
        assert counted == [0]


class LastSeen:
    """A predictor by history whose state tells how often it was shown something."""

    name, look_ahead = "last seen", 1

    def init(self, geometry):
        return geometry.num_experts, 0

    def update(self, state, seen):
        return state[0], state[1] + 1

    def expected(self, state, layer, tokens):
        return [[float(state[1] % (expert + 2)) for expert in range(state[0])]]


def test_a_warm_up_leaves_everything_as_it_was(model):
    """An engine that warmed up in between plans, moves and counts as one that did not."""
    found = []
    for warm in (False, True):
        budget = 9 * model.bank.expert_bytes
        config = OffloadConfig(device_budget=budget, policy="lru", predictor=LastSeen())
        with Engine(model, config) as engine:
            first = engine.generate(PROMPTS, max_new_tokens=4, record_plans=True)
            runner = engine.runner
            rooms = (runner.transfers, runner.host_experts, runner.device_experts)
            state = [runner.decisions.state, runner.account, *(room.stats for room in rooms)]
            held, seen = list(runner.residency.resident), repr(state)
            if warm:
                assert engine.warmup(max_num_seqs=1, prompt_tokens=20, new_tokens=3).programs > 0
            assert repr(state) == seen
            assert list(runner.residency.resident) == held
            second = engine.generate(PROMPTS[:2], max_new_tokens=4, record_plans=True)
            found.append([first.plans, second.plans, second.token_ids, second.stats.bytes_moved])
            found[-1].append(runner.forecasts._state)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"prompt_tokens": 0}, "prompt_tokens must be a whole number, 1 or more, got 0"),
        ({"prompt_tokens": 96}, "prompt_tokens must be less than the model's context of 96, got 96"),
        ({"prompt_tokens": 3, "max_num_seqs": 0}, "max_num_seqs must be 1 or more, got 0"),
        ({"prompt_tokens": 3, "new_tokens": 0}, "new_tokens must be a whole number"),
    ],
    ids=str,
)
def test_sizes_that_no_batch_has_are_refused(model, sizes, message):
    with Engine(model) as engine, pytest.raises(ValueError, match=message):
        engine.warmup(**sizes)


def test_recorded_plans_can_be_warmed_up_for(model):
    config = OffloadConfig(device_budget=9 * model.bank.expert_bytes, policy="lru")
    with Engine(model, config) as engine:
        recorded = engine.generate(PROMPTS, max_new_tokens=1, record_plans=True)
    replay = OffloadConfig(device_budget=9 * model.bank.expert_bytes, policy=Replay(recorded.plans))
    with Engine(model, replay) as engine:
        engine.warmup(max_num_seqs=4, prompt_tokens=14, new_tokens=1)
        assert engine.generate(PROMPTS, max_new_tokens=1).token_ids == recorded.token_ids
