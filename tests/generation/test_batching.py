"""Requests take turns in slots: each gets what it gets alone, and none waits for the slowest."""

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
from compiled_programs import compiled
from exact_cases import RandomPolicy, agree, tap
from helpers import one_jit, random_model
from hypothesis import example, given, settings
from hypothesis import strategies as st

from layerscope_jax import Engine, OffloadConfig, Request
from layerscope_jax.generation.calls import Call, RequestState
from layerscope_jax.generation.limits import Limits
from layerscope_jax.generation.run import Run
from layerscope_jax.generation.scheduler import joining
from layerscope_jax.generation.slots import Slots
from layerscope_jax.kernels.grouping import GROUP_SIZES
from layerscope_jax.models.rotary import PAD_POSITION

pytestmark = pytest.mark.usefixtures("quick_compiles")

RNG = np.random.default_rng(3)
POOL = [RNG.integers(0, 61, size).tolist() for size in (1, 2, 3, 5, 9, 16, 33, 40)]
SHORT = 5
"""The last that is short: prefills of those before it and itself have one width."""

MOST = 20
"""New tokens of a request."""

CONFIGS = {
    "whole": OffloadConfig(numerics="fast"),
    "layers": OffloadConfig(device_budget=9 * 7680, policy="lru"),
    "chunks": OffloadConfig(device_budget=0, policy="host-only", prefill_chunk_size=16),
}


@lru_cache
def model(num_layers=2):
    return random_model(num_layers=num_layers)


MADE = []


@lru_cache
def engine(name, slots=2):
    whole = name == "whole"
    with one_jit(whole):
        MADE.append(Engine(model(1 if whole else 2), replace(CONFIGS[name], max_num_seqs=slots)))
    return MADE[-1]


@pytest.fixture(scope="module", autouse=True)
def closing():
    yield
    while MADE:
        MADE.pop().close()
    engine.cache_clear()  # tests of another file may run between two of this one


@lru_cache
def alone(name, prompt):
    return engine(name).generate([POOL[prompt]], max_new_tokens=MOST, stop_token_ids=()).token_ids[0]


def steps_of(engine, call):
    """What `call` gives, and the shape [rows, width] and the active rows of each of its steps."""
    step, shapes = engine.runner.step, []

    def counted(tokens, positions, *rest):
        shapes.append((*tokens.shape, int((positions != PAD_POSITION).any(1).sum())))
        return step(tokens, positions, *rest)

    engine.runner.step = counted
    try:
        return call(), shapes
    finally:
        engine.runner.step = step


def mixed(counts, prompts=(3, 4), **settings):
    """Requests of so many new tokens each."""
    return [
        Request(prompt=POOL[prompts[n % len(prompts)]], max_new_tokens=count, **settings)
        for n, count in enumerate(counts)
    ]


@pytest.mark.parametrize("name", CONFIGS)
@given(
    requests=st.lists(st.tuples(st.integers(0, len(POOL) - 1), st.integers(1, MOST)), min_size=1, max_size=9),
    slots=st.sampled_from([2, 4]),
    stop=st.none() | st.integers(0, 60),
)
@example(requests=[(7, 20), (0, 1), (1, 2), (6, 1), (2, 20), (0, 1), (5, 7)], slots=2, stop=None)
@example(requests=[(0, 1)] * 9, slots=4, stop=None)
@settings(deadline=None, max_examples=6)
def test_each_request_gets_what_it_gets_alone(name, requests, slots, stop):
    if name == "whole":  # a program of the whole model for each width of prefills would take long to compile
        requests = [(min(prompt, SHORT), count) for prompt, count in requests]
    expected = []
    for prompt, count in requests:
        tokens = alone(name, prompt)[:count]
        expected.append(tokens[: tokens.index(stop) + 1] if stop in tokens else tokens)
    stops = () if stop is None else (stop,)
    given = [Request(prompt=POOL[p], max_new_tokens=count, stop_token_ids=stops) for p, count in requests]
    result, shapes = steps_of(engine(name, slots), lambda: engine(name, slots).generate(given))
    assert result.token_ids == expected
    assert [one.finish_reason for one in result] == [
        "stop" if tokens[-1] == stop else "length" for tokens in expected
    ]
    decode = [active for _, width, active in shapes if width == 1]
    assert max(decode, default=0) <= slots
    assert sum(decode) == sum(len(tokens) - 1 for tokens in expected)  # no step for one that has ended


@pytest.mark.parametrize("name", CONFIGS)
def test_a_long_request_does_not_hold_up_the_others(name):
    counts = [20, 2, 2, 2, 2, 2, 2, 20, 2, 2, 2, 2]
    whole, shapes = steps_of(engine(name, 2), lambda: engine(name, 2).generate(mixed(counts)))
    steps = sum(width == 1 for _, width, _ in shapes)
    parted = 0
    for start in range(0, len(counts), 2):
        part, shapes = steps_of(
            engine(name, 2), lambda start=start: engine(name, 2).generate(mixed(counts)[start : start + 2])
        )
        parted += sum(width == 1 for _, width, _ in shapes)
        assert part.token_ids == whole.token_ids[start : start + 2]
    ideal = sum(count - 1 for count in counts) / 2  # one token of each comes with its prefill
    assert steps <= ideal + 10  # the last one's end, alone
    assert parted == sum(max(counts[n : n + 2]) - 1 for n in range(0, len(counts), 2))
    assert steps < 0.8 * parted


def joins(answers, slots, limit, prompt_tokens=1, chunk=4096):
    """How many requests each prefill begins, and the idle slots of each decode step; no model.

    A request counts down from the length of its answer, and its last token, 0, stops it.
    """
    groups, idle = [], []

    def step(tokens, positions, last, caches, sampling):
        running = int((positions != PAD_POSITION).any(1).sum())
        if tokens.shape[1] > 1:
            groups.append(running)
        else:
            idle.append(slots - running)
        return tokens[np.arange(len(tokens)), last] - 1, None, caches

    def no_caches(rows, length):
        return []

    requests = [Request(prompt=[count] * prompt_tokens) for count in answers]
    call, run, made = Call(), Run(Limits(slots, chunk), no_caches, Slots(no_caches), (0,), None, str), 0
    run.add([RequestState(n, n, request, request.prompt, limit, call) for n, request in enumerate(requests)])
    while states := run.step(step):
        made += len(states)
    assert made == len(call.log) == sum(answers)
    return groups, idle


def test_slots_that_are_freed_together_are_filled_together():
    assert joins([5] * 16, 8, 5)[0] == [8, 8]
    assert joins([2, 2, 3, 3, 9, 9, 9, 9, *[5] * 8], 8, 9)[0] == [8, 4, 4]


@pytest.mark.parametrize("limit", [100, 10_000])
@pytest.mark.parametrize("mean", [10, 100])
def test_the_longer_the_answers_the_fewer_wait_for_each_other(mean, limit):
    """However long they might have become: that is learned from those that ended."""
    answers = np.random.default_rng(0).integers(1, 2 * mean, 200).clip(max=limit).tolist()
    groups, idle = joins(answers, 32, limit)
    enough = joining(32, mean)
    assert enough == {10: 16, 100: 8}[mean]
    later = groups[4:-2]  # the first few know little, and the last are those that are left
    assert np.median(later) == enough
    assert {size.bit_count() for size in groups[:-1]} == {1}
    waiting = len(idle) // 2  # nobody waits in the end
    assert max(idle[waiting // 2 : waiting]) < 2 * enough


def test_who_cannot_share_a_prefill_does_not_wait_to():
    groups, idle = joins([5, 9, 7, 8, 6, 9, 5, 7] * 2, 8, 9, prompt_tokens=40, chunk=48)
    assert groups == [1] * 16
    alone = joins([5, 9, 7, 8, 6, 9, 5, 7] * 2, 8, 9)[1]
    assert len(idle) < len(alone)


def test_times_are_those_of_requests_and_steps():
    times = []
    stats = engine("layers", 2).generate(mixed([3] * 6), on_token=times.append).stats
    assert [event.request for event in times if event.finish_reason] == list(range(6))
    # The last ones had to wait for two others: time to first token counts from the start of the call.
    assert stats.ttft_s > stats.tpot_s
    assert stats.ttft_s < stats.total_s


@pytest.mark.parametrize(
    ("name", "prompts", "widths"), [("whole", (1, 4), (16,)), ("layers", (1, 7, 4), (16, 48))]
)
def test_few_programs_are_compiled_whoever_comes_and_goes(name, prompts, widths):
    model = random_model(num_layers=1, hidden_size=24, head_dim=6, seed=8)  # a shape of its own
    before, kinds = len(compiled), set()
    config = replace(CONFIGS[name], device_budget=None, policy="auto", max_num_seqs=4)
    with one_jit(name == "whole"), Engine(model, config) as engine:
        for counts in ([9, 1, 4, 2, 7, 3], [2, 5, 9, 1], [9], [1, 1, 6], [3, 8, 8, 2, 1], [7, 2, 5]):
            requests = mixed(counts * 3, prompts)
            _, shapes = steps_of(engine, lambda given=requests: engine.generate(given))
            kinds |= {shape[:2] for shape in shapes}
    # One shape of decode steps; 1, 2 or 4 newcomers, of 16 tokens at most or of 40 in 48.
    assert kinds <= {(4, 1), *((rows, width) for rows in (1, 2, 4) for width in widths)}
    # Of each shape: empty caches, what puts them in, and a step; layer by layer it is embed, attend and
    # finish. XLA's products of experts with many tokens have shapes of their own, 16 rows and 32.
    each, others = (3, 2) if name == "whole" else (5, 4 + 2 * len(GROUP_SIZES))
    assert len(compiled) - before <= each * len(kinds) + others


@lru_cache
def long_model(num_layers):
    return random_model(max_position_embeddings=400, num_layers=num_layers, seed=6)


def long_engine(chunk, **changes):
    whole = "numerics" in changes
    with one_jit(whole):
        return Engine(long_model(1 if whole else 2), OffloadConfig(prefill_chunk_size=chunk, **changes))


LONG = [RNG.integers(0, 61, size).tolist() for size in (90, 50, 7, 33, 96)]


@lru_cache
def in_one_step():
    """What long prompts are answered where a chunk holds all of them."""
    with long_engine(4096, policy="host-only", max_num_seqs=4) as engine:
        return engine.generate(LONG, max_new_tokens=3).token_ids


@pytest.mark.parametrize(
    "changes",
    [{"numerics": "fast"}, {"policy": "lru", "device_budget": 9 * 7680}],
    ids=["whole", "lru"],
)
def test_a_prefill_in_chunks_says_the_same(changes):
    """To float32 rounding: products of other shapes round differently."""
    found = {}
    prompts = LONG[:1]
    for chunk in (4096, 30):
        with long_engine(chunk, **changes) as engine:
            logits = tap(engine)
            tokens = [engine.generate([prompt], max_new_tokens=4).token_ids[0] for prompt in prompts]
        steps = [-(-len(prompt) // chunk) + 3 for prompt in prompts]
        assert len(logits) == sum(steps)
        ends = np.cumsum(steps)
        found[chunk] = tokens, [one for end in ends for one in logits[end - 4 : end]]
    (tokens, logits), (expected, whole) = found[30], found[4096]
    assert tokens == expected
    for here, there in zip(logits, whole, strict=True):
        np.testing.assert_allclose(here, there, rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunk", [16, 40])
def test_no_prefill_step_is_larger_than_a_chunk(chunk):
    with long_engine(chunk, policy="host-only", max_num_seqs=4) as engine:
        result, shapes = steps_of(engine, lambda: engine.generate(LONG, max_new_tokens=3))
    prefills = [(rows, width) for rows, width, _ in shapes if width > 1]
    assert max(rows * width for rows, width in prefills) <= chunk
    long = sum(-(-len(prompt) // chunk) for prompt in LONG if len(prompt) > chunk)
    assert prefills.count((1, chunk)) >= long
    assert result.token_ids == in_one_step()


@pytest.mark.parametrize("config", [{}, {"policy": "host-only"}], ids=["whole", "host-only"])
def test_a_longer_prompt_compiles_nothing(config):
    """Past a chunk: its steps have one shape, as long as the caches have one length."""
    with long_engine(32, **config) as engine:
        engine.generate([[1] * 65], max_new_tokens=400 - 65)
        before = len(compiled)
        _, shapes = steps_of(engine, lambda: engine.generate([[1] * 390], max_new_tokens=10))
        assert len(compiled) == before
    assert shapes[:13] == [(1, 32, 1)] * 13
    assert {shape[:2] for shape in shapes[13:]} == {(2, 1)}


def test_joining_and_leaving_a_batch_gives_the_same_bits():
    """With samples, and prompts in several steps."""
    sizes, counts = [40, 3, 33, 40, 3, 33, 40, 3], [9, 2, 5, 1, 7, 3, 4, 6]
    requests = [
        Request(
            prompt=RNG.integers(0, 61, size).tolist(),
            max_new_tokens=count,
            temperature=1.1 if index > 5 else 0.0,
            seed=5,
        )
        for index, (size, count) in enumerate(zip(sizes, counts, strict=True))
    ]

    def run(config):
        with Engine(model(), replace(config, max_num_seqs=4)) as engine:
            logits = tap(engine)
            return engine.generate(requests).token_ids, logits

    expected = run(OffloadConfig(prefill_chunk_size=32))
    for seed in range(2):
        config = OffloadConfig(
            device_budget=(8 + 4 * seed) * model().bank.expert_bytes,
            policy=RandomPolicy(seed),
            prefill_chunk_size=32,
        )
        agree(run(config), expected)
