"""One engine, several callers: threads, streams in turns, and calls from within a call."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import PROFILE, PROMPTS, in_time, one_jit, spelling_model

from layerscope_jax import POLICIES, Engine, OffloadConfig, Replay, Request

pytestmark = pytest.mark.usefixtures("quick_compiles")

KINDS = ["resident", "lru", "auto", "whole"]


def config_of(kind, model):
    budget = 9 * model.bank.expert_bytes
    settings = {
        "resident": {},
        "whole": {},
        "host-only": {"policy": "host-only"},
        "lru": {"policy": "lru", "device_budget": budget},
        "auto": {"device_budget": budget, "profile": PROFILE},  # measuring would take seconds
    }[kind]
    return OffloadConfig(max_num_seqs=4, **settings)  # few shapes to compile


@pytest.fixture(scope="module")
def engines():
    """One of each kind, made when it is first asked for."""
    made = {}

    def engine(kind):
        if kind not in made:
            with one_jit(kind == "whole"):
                made[kind] = Engine(spelling_model(), config_of(kind, spelling_model()))
        return made[kind]

    yield engine
    for one in made.values():
        one.close()


@pytest.fixture(params=KINDS)
def engine(request, engines):
    return engines(request.param)


CALLS = [PROMPTS[:2], PROMPTS[2:], PROMPTS[1:3], PROMPTS]


def meeting(engine, monkeypatch, parties):
    """Whoever comes into a step waits there for others to come in too, for a while; says who ever met."""
    step, inside, met = engine.runner.step, [], []
    arrived = threading.Semaphore(0)

    def waiting(*inputs):
        inside.append(threading.get_ident())
        if len(inside) < parties:
            arrived.acquire(timeout=0.05)  # nobody comes where calls take turns
        else:
            arrived.release()
        met.append(len(set(inside)))
        try:
            return step(*inputs)
        finally:
            inside.remove(threading.get_ident())

    monkeypatch.setattr(engine.runner, "step", waiting)
    return met


@pytest.mark.parametrize("kind", ["resident", "lru"])
def test_threads_share_a_run_and_take_turns_at_its_steps(engines, kind, monkeypatch):
    engine, plans = engines(kind), kind == "lru"
    expected = [engine.generate(prompts, max_new_tokens=4) for prompts in CALLS]
    met = meeting(engine, monkeypatch, 2)
    with ThreadPoolExecutor(len(CALLS)) as pool:
        calls = [
            pool.submit(engine.generate, prompts, max_new_tokens=4, record_plans=plans) for prompts in CALLS
        ]
        results = [in_time(call.result) for call in calls]
    assert [result.token_ids for result in results] == [result.token_ids for result in expected]
    assert set(met) == {1}
    for result, alone in zip(results, expected, strict=True):
        assert result.stats.prompt_tokens == alone.stats.prompt_tokens
        if result.plans:  # of all steps of the run, from the first that it was in to its last
            steps = [plan.step for plan in result.plans]
            assert steps == [step for step in range(steps[0], steps[-1] + 1) for _ in range(2)]
            assert len(steps) >= 2 * 4
        assert result.stats.device_share < 1.1
        assert result.stats.token_hit_rate <= 1


def test_streams_of_several_threads_take_turns(engine, monkeypatch):
    expected = [engine.generate(prompts, max_new_tokens=4).token_ids for prompts in CALLS]
    met = meeting(engine, monkeypatch, 2)

    def read(prompts):
        tokens = [[] for _ in prompts]
        for event in engine.stream(prompts, max_new_tokens=4):
            tokens[event.request].append(event.token_id)
        return tokens

    with ThreadPoolExecutor(len(CALLS)) as pool:
        assert in_time(lambda: list(pool.map(read, CALLS))) == expected
    assert set(met) == {1}


def test_two_streams_are_read_in_turns_by_two_threads(engine):
    expected = engine.generate(PROMPTS[:2], max_new_tokens=5).token_ids
    streams = [engine.stream([prompt], max_new_tokens=5) for prompt in PROMPTS[:2]]
    tokens = [[], []]
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        for _ in range(5):
            for pool, stream, found in zip((one, other), streams, tokens, strict=True):
                found.append(pool.submit(next, stream).result(60).token_id)
    assert tokens == expected


def test_a_run_begins_where_nothing_runs():
    """Recorded plans can be replayed by one stream after the other: each has steps of its own, from 0."""
    model = spelling_model()
    budget = OffloadConfig(policy="lru", device_budget=9 * model.bank.expert_bytes)
    with Engine(model, budget) as engine:
        recorded = engine.generate(PROMPTS[:1], max_new_tokens=4, record_plans=True)
    again = OffloadConfig(policy=Replay(recorded.plans), device_budget=budget.device_budget)
    with Engine(model, again) as engine:
        dropped = engine.stream(PROMPTS[:1], max_new_tokens=4)
        next(dropped)
        dropped.close()
        for _ in range(2):
            tokens = [event.token_id for event in engine.stream(PROMPTS[:1], max_new_tokens=4)]
            assert [tokens] == recorded.token_ids


def test_generate_while_a_stream_is_held(engine):
    expected = engine.generate(PROMPTS, max_new_tokens=5).token_ids
    stream = engine.stream(PROMPTS[:2], max_new_tokens=5)
    first = next(stream)
    result = in_time(lambda: engine.generate(PROMPTS, max_new_tokens=5, record_plans=True))
    assert result.token_ids == expected
    assert result.stats.prompt_tokens == 23
    tokens = [[], []]
    for event in [first, *stream]:
        tokens[event.request].append(event.token_id)
    assert tokens == engine.generate(PROMPTS[:2], max_new_tokens=5).token_ids


def test_generate_from_within_on_token(engine):
    """By the same thread, by another that this one waits for, and a stream's steps too."""
    alone = engine.generate(PROMPTS[:2], max_new_tokens=4, record_plans=True)
    other = engine.generate(PROMPTS[2:], max_new_tokens=3, record_plans=True)
    stream = engine.stream(PROMPTS[:1], max_new_tokens=9)
    inner = []

    def on_token(event):
        def call():
            return engine.generate(PROMPTS[2:], max_new_tokens=3, record_plans=True)

        if event.request == 0 and len(inner) < 3:
            inner.append(call())
            with ThreadPoolExecutor(1) as pool:
                inner.append(pool.submit(call).result(60))
            next(stream)

    result = in_time(
        lambda: engine.generate(PROMPTS[:2], max_new_tokens=4, record_plans=True, on_token=on_token)
    )
    assert result.token_ids == alone.token_ids
    assert len(inner) == 4
    for found, expected in [(result, alone), *((each, other) for each in inner)]:
        assert found.token_ids == expected.token_ids
        assert (found.plans != []) == (expected.plans != [])
        assert found.stats.prompt_tokens == expected.stats.prompt_tokens
        assert found.stats.new_tokens == expected.stats.new_tokens
        assert (found.stats.kernels is None) == (expected.stats.kernels is None)


def test_counts_are_of_what_was_done_meanwhile(engines):
    """Plans and counts of a call are of the same steps: those of the run while the call was in it."""
    engine, nested = engines("host-only"), []
    prompts = {"max_new_tokens": 4, "record_plans": True}
    alone = [engine.generate(PROMPTS[:2], **prompts), engine.generate(PROMPTS[2:], **prompts)]

    def on_token(event):
        if not nested:
            nested.append(engine.generate(PROMPTS[2:], **prompts))

    outer = engine.generate(PROMPTS[:2], on_token=on_token, **prompts)
    for result in (*alone, outer, *nested):
        assert result.stats.dispatches == len(result.plans)  # on a CPU: one a layer
    assert len(alone[0].plans) == len(alone[1].plans) == 2 * 4
    assert (
        len(nested[0].plans) == 2 * 4
    )  # a prefill of its own, and all others together with the outer call's
    assert [plan.step for plan in nested[0].plans] == [step for step in range(1, 5) for _ in range(2)]
    assert [plan.step for plan in outer.plans] == [step for step in range(5) for _ in range(2)]
    for here, there in ((outer, alone[0]), (nested[0], alone[1])):
        assert here.token_ids == there.token_ids
        assert here.stats.new_tokens == there.stats.new_tokens


def test_warmup_beside_a_call_and_within_one(engine):
    expected = engine.generate(PROMPTS[:2], max_new_tokens=4).token_ids

    def on_token(event):
        engine.warmup(max_num_seqs=2, prompt_tokens=14, new_tokens=4)

    assert (
        in_time(lambda: engine.generate(PROMPTS[:2], max_new_tokens=4, on_token=on_token)).token_ids
        == expected
    )
    runner = engine.runner
    with ThreadPoolExecutor(2) as pool:
        warm = pool.submit(engine.warmup, max_num_seqs=2, prompt_tokens=14, new_tokens=4)
        call = pool.submit(engine.generate, PROMPTS[:2], max_new_tokens=4)
        warm.result(60)
        assert call.result(60).token_ids == expected
    assert engine.runner is runner


@pytest.mark.parametrize(
    ("kind", "call"), [("resident", "generate"), ("whole", "stream"), ("lru", "generate"), ("lru", "stream")]
)
def test_closing_while_another_thread_generates(kind, call, monkeypatch):
    """The step goes on to its end, the call is told, and nobody hangs."""
    model = spelling_model()
    with one_jit(kind == "whole"):
        engine = Engine(model, config_of(kind, model))
    step, begun, closing = engine.runner.step, threading.Event(), threading.Event()

    def slow(*inputs):
        begun.set()
        assert closing.wait(60)
        return step(*inputs)

    monkeypatch.setattr(engine.runner, "step", slow)
    with ThreadPoolExecutor(2) as pool:
        calls = {"stream": lambda: list(engine.stream(PROMPTS)), "generate": lambda: engine.generate(PROMPTS)}
        running = pool.submit(calls[call])
        assert begun.wait(60)
        ended = pool.submit(engine.close)
        while not engine._resources.closed:
            pass
        closing.set()
        with pytest.raises(ValueError, match="the engine was closed; make a new Engine"):
            running.result(60)
        ended.result(60)


def test_an_exception_of_on_token_passes_through(engine):
    expected = engine.generate(PROMPTS, max_new_tokens=4).token_ids

    class Mine(Exception):
        pass

    def on_token(event):
        raise Mine("mine")

    for _ in range(2):
        with pytest.raises(Mine, match=r"^mine$"):
            engine.generate(PROMPTS, max_new_tokens=4, on_token=on_token)
        assert engine.generate(PROMPTS, max_new_tokens=4).token_ids == expected
    with ThreadPoolExecutor(1) as pool:  # no turn was kept
        assert pool.submit(engine.generate, PROMPTS, max_new_tokens=4).result(60).token_ids == expected


def test_a_policy_that_generates_is_refused():
    model = spelling_model()
    engines = []

    class Calling(POLICIES["lru"]):
        def plan(self, state, seen):
            engines[0].generate([[1]], max_new_tokens=1)

    config = OffloadConfig(policy=Calling(), device_budget=9 * model.bank.expert_bytes)
    with Engine(model, config) as engine:
        engines.append(engine)
        with pytest.raises(ValueError, match=r"running a step on this thread.*a policy"):
            in_time(lambda: engine.generate([[1]], max_new_tokens=1))


def test_requests_of_two_threads_keep_their_seeds(engines):
    engine = engines("resident")
    requests = [Request(prompt=prompt, temperature=1.0, seed=5, max_new_tokens=4) for prompt in PROMPTS]
    expected = [engine.generate([request]).token_ids for request in requests]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda request: engine.generate([request]).token_ids, requests))
    assert found == expected


@pytest.mark.parametrize("kind", ["resident", "lru"])
def test_handles_of_requests_that_come_at_any_time(engines, kind):
    """Longer ones than were there: each gets what it gets alone; one leaves early."""
    engine = engines(kind)
    asked = [
        Request(prompt=PROMPTS[0], max_new_tokens=12),
        Request(prompt=PROMPTS[2], max_new_tokens=5),
        Request(prompt=PROMPTS[3], max_new_tokens=70),
        Request(prompt=PROMPTS[1], max_new_tokens=3),
    ]
    expected = [engine.generate([request])[0] for request in asked]
    first = engine.submit(asked[0])
    reader = iter(first)
    tokens = [next(reader).token_id]
    handles = [engine.submit(request) for request in asked[1:]]
    tokens += [next(reader).token_id for _ in range(3)]
    handles[1].cancel()
    results = [first.result(), *[handle.result() for handle in handles]]
    assert tokens == expected[0].token_ids[:4]
    for result, alone in zip(results, expected, strict=True):
        if result.finish_reason == "abort":
            assert 0 < len(result.token_ids) < 70
            assert result.token_ids == alone.token_ids[: len(result.token_ids)]
        else:
            assert (result.token_ids, result.text) == (alone.token_ids, alone.text)
    assert [result.finish_reason for result in results] == ["length", "length", "abort", "length"]


def test_a_step_that_fails_ends_the_call_that_drove_it_alone(engine, monkeypatch):
    """The others are prefilled anew, with the tokens that they have."""
    expected = engine.generate(PROMPTS[:2], max_new_tokens=8)
    step, calls = engine.runner.step, []

    def failing(*inputs):
        calls.append(None)
        if len(calls) == 4:
            step(*inputs)  # takes the caches
            raise KeyboardInterrupt
        return step(*inputs)

    monkeypatch.setattr(engine.runner, "step", failing)
    first, second = [engine.submit(prompt, max_new_tokens=8) for prompt in PROMPTS[:2]]
    with pytest.raises(KeyboardInterrupt):
        second.result()
    assert second.result().finish_reason == "abort"
    assert second.result().token_ids == expected[1].token_ids[:3]
    result = in_time(first.result)
    assert (result.token_ids, result.text) == (expected[0].token_ids, expected[0].text)


def test_a_handle_that_nobody_holds_is_cancelled(engine):
    handle = engine.submit(PROMPTS[0], max_new_tokens=50)
    next(iter(handle))
    del handle
    assert engine._loop._run is None
    read = [token.token_id for token in engine.submit(PROMPTS[0], max_new_tokens=4)]  # its reader holds it
    assert read == engine.generate(PROMPTS[:1], max_new_tokens=4).token_ids[0]


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ([1], {"temprature": 1.0}, r"got 'temprature' \(did you mean 'temperature'\?\)"),
        ([1], {"max_num_seqs": 1}, r"an engine has it: OffloadConfig\(max_num_seqs=\)"),
        (Request(prompt=[1]), {"seed": 1}, "seed cannot be given beside a Request.*set it in the Request"),
        ([1], {"top_p": 2.0}, "top_p must be"),
        ([], {}, "the prompt is empty"),
        (5, {}, "the prompt must be text"),
        ([[1]], {}, "the prompt must be text"),
        ([999], {}, "the prompt has ids outside"),
    ],
    ids=str,
)
def test_what_cannot_be_submitted(engines, prompt, settings, message):
    with pytest.raises(ValueError, match=message):
        engines("host-only").submit(prompt, **settings)
