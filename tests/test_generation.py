"""Prompts in, tokens out: what a caller may rely on, whichever way the model runs."""

import gc
import threading
from contextlib import contextmanager
from dataclasses import replace

import jax
import numpy as np
import pytest
from helpers import PROFILE, Copies, compiled, in_time, random_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from layerscope_jax import (
    Engine,
    HardwareProfile,
    OffloadConfig,
    Request,
    TransferError,
    load,
    parse_bytes,
    save,
)
from layerscope_jax.experts.executors import grouped_ffn
from layerscope_jax.experts.grouping import GROUP_SIZES
from layerscope_jax.generation import batch_rows, bucket
from layerscope_jax.scheduling.baselines import LRU, POLICIES, HostOnly, Resident

VOCABULARY = 280
EOS, PAD = 278, 279
SNOWMAN = "☃"  # three bytes


def byte_tokenizer():
    """A token a byte, twenty-two idle ids, and two special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)}
    vocabulary |= {f"idle{index}": 256 + index for index in range(22)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    assert tokenizer.add_special_tokens(["<eos>", "<pad>"]) == 2
    assert tokenizer.get_vocab_size() == VOCABULARY
    return tokenizer


@pytest.fixture(scope="module")
def model():
    model = random_model(vocab_size=VOCABULARY, num_layers=2, seed=4)
    return replace(model, tokenizer=byte_tokenizer())


@pytest.fixture(scope="module")
def whole(model):
    with Engine(model) as engine:
        yield engine


@pytest.fixture(scope="module")
def layers(model):
    """Layer by layer, with experts coming and going."""
    with Engine(model, OffloadConfig(device_budget=9 * model.bank.expert_bytes)) as engine:
        yield engine


@pytest.fixture(params=["whole", "layers"])
def engine(request):
    return request.getfixturevalue(request.param)


class Dictation:
    """Stands for a runner that says given tokens, one row each."""

    def __init__(self, rows):
        self.rows, self.said = rows, -1

    def step(self, tokens, positions, last, caches, sampling):
        self.said += 1
        found = [row[min(self.said, len(row) - 1)] for row in self.rows]
        return np.array(found + [0] * (len(tokens) - len(found)), np.int32), None, caches


PROMPTS = [[5, 200, 7], [17], list(range(30, 44)), [9, 9, 9, 100, 3]]


def test_a_ragged_batch_gives_what_each_prompt_gives_alone(engine):
    together = engine.generate(PROMPTS, max_new_tokens=12)
    for prompt, tokens in zip(PROMPTS, together.tokens, strict=True):
        assert engine.generate([prompt], max_new_tokens=12).tokens == [tokens]
    assert len({tuple(tokens) for tokens in together.tokens}) == 4
    assert together.finish == ["length"] * 4
    backwards = engine.generate(PROMPTS[::-1], max_new_tokens=12)
    assert backwards.tokens == together.tokens[::-1]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_how_prompts_are_parted_into_batches_does_not_matter(engine, size):
    together = engine.generate(PROMPTS, max_new_tokens=6)
    parted = engine.generate(PROMPTS, max_new_tokens=6, batch_size=size)
    assert parted.tokens == together.tokens
    assert parted.texts == together.texts
    assert (parted.stats.prompts, parted.stats.prompt_tokens) == (4, 23)


def test_texts_and_their_ids_are_the_same_prompt(engine, model):
    ids = model.tokenizer.encode(SNOWMAN + " ab").ids
    by_text, by_ids = engine.generate([SNOWMAN + " ab", ids, np.array(ids)], max_new_tokens=4).tokens[:2]
    assert by_text == by_ids


def test_each_request_has_its_own_length(engine):
    long = engine.generate([PROMPTS[0]] * 4, max_new_tokens=9).tokens[0]
    requests = [Request(prompt=PROMPTS[0], max_new_tokens=count) for count in (1, 9, 2, 5)]
    result = engine.generate(requests, max_new_tokens=7)  # settings are for prompts that are no requests
    assert result.tokens == [long[:1], long, long[:2], long[:5]]
    assert result.stats.new_tokens == 17


def test_a_stop_token_ends_its_own_request(engine):
    free = engine.generate(PROMPTS, max_new_tokens=10)
    stop = free.tokens[1][4]
    result = engine.generate(PROMPTS, max_new_tokens=10, stop_tokens=[PAD, stop])
    for tokens, why, text, whole in zip(result.tokens, result.finish, result.texts, free.tokens, strict=True):
        if stop in whole:
            assert tokens == whole[: whole.index(stop) + 1]
            assert why == "stop"
            assert text == engine.model.tokenizer.decode(tokens[:-1])
        else:
            assert (tokens, why) == (whole, "length")
    assert result.finish[1] == "stop"
    assert "length" in result.finish

    # The last token that is allowed may be the one to stop at.
    last = engine.generate(PROMPTS[:2], max_new_tokens=5, stop_tokens=(stop,))
    assert last.finish[1] == "stop"
    assert engine.generate(PROMPTS, max_new_tokens=10, stop_tokens=()).tokens == free.tokens


def test_the_models_own_stop_tokens_are_the_default(model, layers):
    free = layers.generate(PROMPTS[:2], max_new_tokens=8).tokens
    stopping = replace(model, config=replace(model.config, stop_tokens=(free[0][3],)))
    with Engine(stopping, layers.config) as engine:
        result = engine.generate(PROMPTS[:2], max_new_tokens=8)
        assert result.tokens[0] == free[0][: free[0].index(free[0][3]) + 1]
        assert result.finish[0] == "stop"
        assert engine.generate(PROMPTS[:2], max_new_tokens=8, stop_tokens=[]).tokens == free


def test_the_context_ends_a_request(model, monkeypatch):
    """The last position there is may be filled, and none after it."""
    prompts = [[1] * 95, [1] * 90, [1] * 4]
    assert model.config.max_positions == 96
    with Engine(model, OffloadConfig(policy="host-only")) as engine:
        monkeypatch.setattr(engine, "runner", Dictation([[7, 8, 9]] * 3))
        events = list(engine.stream(prompts, max_new_tokens=10))
    counts = [sum(event.request == index for event in events) for index in range(3)]
    assert counts == [1, 6, 10]
    assert [event.request for event in events if event.finish == "length"] == [0, 1, 2]


def check_stream(engine, **settings):
    settings |= {"max_new_tokens": 12, "stop_tokens": [PAD], "batch_size": 3}
    expected = engine.generate(PROMPTS, **settings)
    tokens, texts, finish = [[] for _ in PROMPTS], [""] * 4, [None] * 4
    for event in engine.stream(PROMPTS, **settings):
        assert finish[event.request] is None
        tokens[event.request].append(event.token)
        texts[event.request] += event.text
        finish[event.request] = event.finish
    assert (tokens, texts, finish) == (expected.tokens, expected.texts, expected.finish)
    assert any(texts)


def test_a_stream_is_what_generate_gives(engine):
    check_stream(engine)


def test_a_stream_of_samples_is_what_generate_gives(layers):
    check_stream(layers, temperature=1.5, seed=3)


@pytest.mark.parametrize(
    ("text", "specials", "finish", "expected"),
    [
        ("a" + SNOWMAN + "b", [], "length", "a" + SNOWMAN + "b"),
        ("a" + SNOWMAN, [EOS], "stop", "a" + SNOWMAN),
        (SNOWMAN, [PAD, EOS], "stop", SNOWMAN),  # a special token has no text
        ("é" * 3, [PAD], "length", "ééé"),
        ("", [EOS], "stop", ""),
    ],
)
@pytest.mark.parametrize("cut", [0, 1, 2])
def test_pieces_of_text_join_to_the_text(model, monkeypatch, text, specials, finish, expected, cut):
    """Characters of several bytes come whole; one that is cut off is shown as `generate` shows it."""
    ids = model.tokenizer.encode(text).ids
    ids = ids[: len(ids) - cut] + specials if text else specials
    with Engine(model, OffloadConfig(policy="host-only")) as engine:
        monkeypatch.setattr(engine, "runner", Dictation([ids]))
        events = list(engine.stream(["x"], max_new_tokens=len(ids), stop_tokens=[EOS]))
        assert [event.token for event in events] == ids
        joined = "".join(event.text for event in events)
        assert events[-1].finish == finish
        assert joined == model.tokenizer.decode(ids)  # special tokens left out
        if not cut:
            assert joined == expected
        assert all("\N{REPLACEMENT CHARACTER}" not in event.text for event in events[:-1])


SAMPLED = {"max_new_tokens": 8, "temperature": 1.2}


def test_a_seed_gives_the_same_tokens_whatever_shares_the_batch(layers):
    requests = [Request(prompt=prompt, seed=seed, **SAMPLED) for seed, prompt in enumerate(PROMPTS)]
    tokens = layers.generate(requests).tokens
    assert layers.generate(requests).tokens == tokens
    assert layers.generate(requests[::-1]).tokens == tokens[::-1]
    for request, alone in zip(requests, tokens, strict=True):
        assert layers.generate([request]).tokens == [alone]
    greedy = Request(prompt=PROMPTS[3], max_new_tokens=8)
    mixed = layers.generate([requests[2], greedy])
    assert mixed.tokens == [tokens[2], layers.generate([greedy]).tokens[0]]
    assert layers.generate([replace(requests[0], seed=77)]).tokens != [tokens[0]]
    # Two samples of one prompt are two samples.
    assert (
        len({tuple(t) for t in layers.generate([replace(requests[0], seed=s) for s in range(4)]).tokens}) == 4
    )


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-6}], ids=str)
def test_sampling_with_one_choice_is_greedy(layers, settings):
    greedy = layers.generate(PROMPTS, max_new_tokens=6)
    result = layers.generate(PROMPTS, **{"max_new_tokens": 6, "temperature": 5.0, "seed": 1} | settings)
    assert result.tokens == greedy.tokens


# ---- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "at least one prompt"),
        ("Call me", "list of prompts, got 'Call me'; put it in a list"),
        ([3, 4, 5], "ids of a lone prompt in a list of their own"),
        (np.array([3, 4]), "ids of a lone prompt in a list of their own"),
        (Request(prompt=[3]), "list of prompts, got 'Request"),
        ([[]], "prompt 0 is empty"),
        ([[1], ""], "prompt 1 is empty"),
        ([[1], [0] * 96], "prompt 1 has 96 tokens; the model's context holds 96.*shorten it"),
        ([[1], [280, 4, -1]], r"prompt 1 has ids outside 0..279: \[280, -1\]"),
        ([[], [999]], "prompt 0 is empty.*prompt 1 has ids outside"),
    ],
)
@pytest.mark.parametrize("call", ["generate", "stream"])
def test_bad_prompts_are_refused_at_once(layers, call, prompts, message):
    with pytest.raises(ValueError, match=message):
        getattr(layers, call)(prompts)


@pytest.mark.parametrize("call", ["generate", "stream"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more, got 0"),
        ({"temperature": -0.1}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"top_p": 0.0}, "top_p must lie"),
        ({"top_p": 1.1}, "top_p must lie"),
        ({"top_p": float("nan")}, "top_p must lie"),
        ({"seed": -1}, "seed must lie"),
        ({"seed": 2**32}, "seed must lie"),
        ({"top_k": -1, "top_p": 2.0}, "top_k must be.*; top_p must lie"),
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_at_once(layers, call, settings, message):
    with pytest.raises(ValueError, match=message):
        getattr(layers, call)([[1]], **settings)


def test_extreme_settings_that_are_allowed(layers):
    assert layers.generate([[1]], max_new_tokens=1, seed=2**32 - 1, temperature=1.0, top_k=10**12).tokens


def test_text_needs_a_tokenizer(model, layers):
    with Engine(replace(model, tokenizer=None), layers.config) as engine:
        with pytest.raises(ValueError, match=r"prompt 1 is text, but the model came without tokenizer.json"):
            engine.generate([[1], "text"])
        result = engine.generate([[1]], max_new_tokens=2)
        assert result.texts == [""]
        assert [event.text for event in engine.stream([[1]], max_new_tokens=2)] == ["", ""]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"policy": "magic"}, "policy must be one of fiddler, host-only, lru.* got 'magic'"),
        ({"device_budget": "8 Gb"}, "device_budget must be a size such as '8GiB'.* got '8 Gb'"),
        ({"device_budget": -1}, "device_budget must be a size"),
        ({"device_budget": 1.5}, "device_budget must be a size"),
        ({"device_budget": True}, "device_budget must be a size"),
        ({"link_bandwidth": "fast"}, "link_bandwidth must be a size"),
        ({"link_bandwidth": 0}, "link_bandwidth must be more than 0"),
        ({"numerics": "exactly"}, "numerics must be 'fast' or 'exact', got 'exactly'"),
        (
            {"policy": "lru", "device_budget": "10 KB"},
            "device_budget is too small for policy 'lru'.*61,440 bytes",
        ),
        ({"policy": "on-demand", "device_budget": 0}, "device_budget is too small for policy 'on-demand'"),
        (
            {"policy": "resident", "device_budget": "100KB"},
            "'resident' needs a device_budget for all 16 experts",
        ),
    ],
    ids=str,
)
def test_bad_configurations_are_refused(model, config, message):
    before = threading.active_count()
    with pytest.raises(ValueError, match=message):
        Engine(model, OffloadConfig(**config))
    gc.collect()
    assert threading.active_count() <= before


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("8GiB", 2**33),
        ("500 MB", 500_000_000),
        (" 1.5 KiB ", 1536),
        ("0", 0),
        ("7", 7),
        ("7B", 7),
        ("2TB", 2 * 10**12),
        ("9007199254740993", 9007199254740993),
        (12, 12),
    ],
)
def test_sizes(size, expected):
    assert parse_bytes(size) == expected


@pytest.mark.parametrize(
    "size", ["", "GiB", "8 Gb", "8gib", "-1", "1e9", "1.5.2MB", "inf", "٣MB", None, 2.0, True, -3]
)
def test_what_is_no_size(size):
    with pytest.raises(ValueError, match="budget must be a size such as"):
        parse_bytes(size, "budget")


def test_bucket_and_rows():
    assert [batch_rows(count) for count in (1, 2, 3, 4, 5, 32, 33)] == [2, 2, 4, 4, 8, 32, 64]
    for least in (16, 64):
        sizes = [bucket(size, least) for size in range(1, 500)]
        assert all(size <= found < 2 * max(size, least) for size, found in enumerate(sizes, 1))
        assert sizes == sorted(sizes)
        assert len(set(sizes)) <= 11


# ---- statistics --------------------------------------------------------------------------------------------


def test_statistics_of_a_resident_model(model, whole):
    result = whole.generate(PROMPTS, max_new_tokens=5)
    stats = result.stats
    assert (stats.policy, stats.mode) == ("resident", "whole")
    assert stats.hit_rate == stats.token_hit_rate == 1
    assert stats.bytes_moved == stats.bytes_wasted == 0
    assert stats.peak_expert_bytes == stats.budget_bytes == model.bank.total_bytes
    assert (stats.prompts, stats.prompt_tokens, stats.new_tokens) == (4, 23, 20)
    assert stats.tokens_per_s == stats.new_tokens / stats.total_s
    assert 0 < stats.tpot_s < stats.total_s
    assert 0 < stats.ttft_s < stats.total_s
    assert 0 < stats.device_share <= 1

    with Engine(model, OffloadConfig(numerics="exact")) as engine:
        exact = engine.generate(PROMPTS, max_new_tokens=5)
    assert exact.tokens == result.tokens
    assert (exact.stats.policy, exact.stats.mode) == ("resident", "layers")
    assert exact.stats.hit_rate == exact.stats.token_hit_rate == 1
    assert exact.stats.bytes_moved == 0
    assert exact.stats.peak_expert_bytes == model.bank.total_bytes
    assert exact.stats.dispatches > 0


@pytest.mark.parametrize("policy", ["lru", "on-demand", "host-only", "fiddler"])
@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_bytes_are_those_that_moved(model, policy, rate):
    copies = Copies(rate)
    budget = 10 * model.bank.expert_bytes
    config = OffloadConfig(device_budget=budget, policy=policy, profile=PROFILE)
    with Engine(model, config, copy=copies) as engine:
        moved = 0
        for prompts in (PROMPTS, PROMPTS[:2]):
            result = engine.generate(prompts, max_new_tokens=5, record_plans=True)
            stats = result.stats
            assert stats.bytes_moved == stats.bytes_demand == copies.moved - moved
            assert stats.bytes_prefetch == stats.bytes_wasted == 0
            loads = sum(len(plan.load) for plan in result.plans)
            assert stats.bytes_moved == loads * model.bank.expert_bytes
            assert stats.peak_expert_bytes <= stats.budget_bytes == budget
            moved = copies.moved
            active = sum(len(plan.device) + len(plan.host) for plan in result.plans)
            if policy in ("lru", "on-demand"):
                assert stats.hit_rate == pytest.approx(1 - loads / active)
            assert 0 <= stats.hit_rate < 1
            assert 0 <= stats.token_hit_rate < 1
            assert 0 < stats.padding < 1
            assert (stats.host_share > 0) == any(plan.host for plan in result.plans)
            assert stats.link_share <= 1.001
        if policy == "host-only":
            assert stats.bytes_moved == stats.hit_rate == stats.peak_expert_bytes == 0
        else:
            assert copies.moved > 0
            assert (copies.failed > 0) == (rate > 0)
    assert stats.policy == policy
    assert stats.to_json()["bytes_moved"] == stats.bytes_moved


def test_recorded_plans_are_the_calls_own(layers):
    first = layers.generate(PROMPTS[:2], max_new_tokens=3, record_plans=True)
    assert [(plan.step, plan.layer) for plan in first.plans] == [(s, x) for s in range(3) for x in range(2)]
    assert layers.generate(PROMPTS[:2], max_new_tokens=3).plans == []
    assert len(first.plans) == 6


def test_padding_and_finished_requests_route_nowhere(model, layers):
    """A token has K experts; whoever has ended has none."""
    requests = [Request(prompt=[5] * size, max_new_tokens=new) for size, new in ((1, 6), (1, 1), (1, 2))]
    plans = layers.generate(requests, record_plans=True).plans
    choices = model.config.experts_per_token
    for plan in plans:
        running = 3 if plan.step == 0 else 2 if plan.step == 1 else 1
        assert choices <= len(plan.device + plan.host) <= choices * running
    assert {len(plan.device + plan.host) for plan in plans if plan.step > 1} == {choices}


def test_a_progress_bar_changes_nothing(layers, capsys):
    plain = layers.generate(PROMPTS, max_new_tokens=3)
    assert layers.generate(PROMPTS, max_new_tokens=3, progress=True).tokens == plain.tokens


# ---- engines -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("numerics", ["fast", "exact"])
@pytest.mark.parametrize("policy", [Resident(), "resident", "lru"], ids=["object", "resident", "lru"])
def test_everything_fits_without_a_budget(model, policy, numerics):
    with Engine(model, OffloadConfig(policy=policy, numerics=numerics)) as engine:
        stats = engine.generate(PROMPTS, max_new_tokens=2).stats
    assert (stats.policy, stats.hit_rate, stats.bytes_moved) == ("resident", 1, 0)
    assert stats.mode == {"fast": "whole", "exact": "layers"}[numerics]


@pytest.mark.parametrize("policy", ["host-only", HostOnly(), LRU()], ids=["host-only", "HostOnly()", "LRU()"])
def test_who_names_host_only_or_brings_a_policy_gets_it(model, policy):
    with Engine(model, OffloadConfig(policy=policy)) as engine:
        stats = engine.generate(PROMPTS, max_new_tokens=2).stats
    assert (stats.policy, stats.mode) == (policy if isinstance(policy, str) else policy.name, "layers")


@pytest.mark.parametrize("numerics", ["fast", "exact"])
def test_it_runs_on_the_models_device(tmp_path, numerics):
    save(random_model(num_layers=1, qk_norm="all"), tmp_path)
    model = load(tmp_path, device=jax.devices()[1])
    with Engine(model, OffloadConfig(numerics=numerics)) as engine:
        assert engine.device == model.device == jax.devices()[1]
        assert len(engine.generate([[1, 2]], max_new_tokens=2).tokens[0]) == 2
    with pytest.raises(ValueError, match="device must be the model's own"):
        Engine(model, OffloadConfig(numerics=numerics), device=jax.devices()[0])


def test_a_closed_engine_says_so(model):
    engine = Engine(model, OffloadConfig(device_budget=9 * model.bank.expert_bytes))
    engine.close()
    engine.close()
    with pytest.raises((TransferError, RuntimeError), match="closed"):
        in_time(lambda: engine.generate([[1]], max_new_tokens=2))


def test_leaving_an_engine_ends_its_threads(model):
    before = set(threading.enumerate())
    with Engine(
        model, OffloadConfig(device_budget=9 * model.bank.expert_bytes, policy="fiddler", profile=PROFILE)
    ) as engine:
        engine.generate(PROMPTS, max_new_tokens=2)
        assert {thread.name.split("_")[0] for thread in set(threading.enumerate()) - before} >= {
            "layerscope-link"
        }
    assert not [t for t in set(threading.enumerate()) - before if t.name.startswith("layerscope")]

    engine = Engine(model, OffloadConfig(device_budget=9 * model.bank.expert_bytes))
    del engine
    gc.collect()
    assert not [t for t in set(threading.enumerate()) - before if t.name.startswith("layerscope")]


def test_an_abandoned_stream_leaves_the_engine_fit(layers):
    expected = layers.generate(PROMPTS, max_new_tokens=5).tokens
    stream = layers.stream(PROMPTS, max_new_tokens=5)
    next(stream)
    stream.close()
    assert layers.generate(PROMPTS, max_new_tokens=5).tokens == expected


def test_a_policy_that_weighs_costs_measures_the_machine(model):
    """Where no profile is given; within the given pace of the link."""
    seen = []

    class Asking(POLICIES["fiddler"]):
        def init(self, geometry, profile):
            seen.append(profile)
            return super().init(geometry, profile)

    config = OffloadConfig(device_budget=9 * model.bank.expert_bytes, policy=Asking(), link_bandwidth="1MB")
    with Engine(model, config) as engine:
        assert engine.generate(PROMPTS[:2], max_new_tokens=2).tokens
    (profile,) = seen
    assert isinstance(profile, HardwareProfile)
    assert profile.transfer_ms >= 1e3 * model.bank.expert_bytes / 1e6
    for table in (profile.host_ms, profile.device_ms):
        assert min(table.ms) > 0
        assert list(table.ms) == sorted(table.ms)


# ---- what is compiled --------------------------------------------------------------------------------------


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
        "resident": OffloadConfig(numerics="exact"),
        "whole": OffloadConfig(),
    }[policy]
    with Engine(model, config) as engine:
        first = engine.generate(PROMPTS, max_new_tokens=10)
        with compiling() as counted:
            assert engine.generate(PROMPTS, max_new_tokens=10).tokens == first.tokens
    assert counted == [0]


@pytest.mark.parametrize(
    "config", [OffloadConfig(device_budget=0, policy="host-only"), OffloadConfig()], ids=["layers", "whole"]
)
def test_another_engine_of_the_model_compiles_nothing(model, config):
    with Engine(model, config) as engine:
        engine.generate(PROMPTS, max_new_tokens=3)
    with compiling() as counted, Engine(model, config) as engine:
        engine.generate(PROMPTS, max_new_tokens=3)
    assert counted == [0]


def test_a_long_decode_compiles_few_programs():
    """However experts arrive: at most one for each row bucket, size of dispatch and phase."""
    model = random_model(num_layers=2, hidden_size=24, head_dim=6, seed=9)  # a shape of its own
    config = OffloadConfig(device_budget=9 * model.bank.expert_bytes, policy="lru")
    prefill_buckets, decode_buckets = 5, 1  # 2 to 32 rows for 2 x 16 tokens, and 2 for 2
    bound = (prefill_buckets + decode_buckets) * len(GROUP_SIZES)
    others = 4 * 2 + 4  # embed, attend, add and finish in two phases; empty buffers
    before = grouped_ffn._cache_size()
    with Engine(model, config) as engine:
        with compiling() as counted:
            result = engine.generate([[1, 2, 3], list(range(16))], max_new_tokens=41)
        assert [len(tokens) for tokens in result.tokens] == [41, 41]
        assert 0 < grouped_ffn._cache_size() - before <= bound
        assert counted[0] <= bound + others
        for first in range(5):
            engine.generate([[first], list(range(first, 12))], max_new_tokens=30)
        assert grouped_ffn._cache_size() - before <= bound
