"""What an engine is given by mistake: refused at once, by a sentence that names it."""

import array
from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import PROMPTS, byte_tokenizer, spelling_model
from tokenizers import Tokenizer, models, normalizers

from layerscope_jax import Engine, OffloadConfig, Request
from layerscope_jax.generation.arguments import make_requests
from layerscope_jax.generation.encoding import encode_prompts, encode_within

pytestmark = pytest.mark.usefixtures("quick_compiles")

NAMES = "max_new_tokens, min_new_tokens, n, temperature, .*, chat_template_kwargs"


@pytest.fixture(scope="module")
def engine():
    with Engine(spelling_model(), OffloadConfig(policy="host-only")) as engine:
        yield engine


@pytest.mark.parametrize("call", ["generate", "stream"])
@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([[1]], {"temprature": 0.9}, rf"among {NAMES}, got 'temprature' \(did you mean 'temperature'\?\)"),
        ([Request(prompt=[1])], {"temprature": 0.9}, r"got 'temprature' \(did you mean 'temperature'\?\)"),
        ([[1]], {"max_tokens": 3, "zzz": 1}, r"'max_tokens' \(did you mean 'max_new_tokens'\?\), 'zzz'$"),
        ([[1]], {"prompt": "a"}, "expected settings among .*, got 'prompt'"),
        (
            [Request(prompt=[1])] * 2,
            {"temperature": 0.9, "seed": 1},
            "temperature, seed cannot be given beside prompts that are all Requests.*set it in each",
        ),
        (
            [[1]],
            {"max_num_seqs": 3},
            r"got 'max_num_seqs' \(an engine has it: OffloadConfig\(max_num_seqs=\)\)",
        ),
        ([[1]], {"max_num_seq": 3}, r"got 'max_num_seq' \(did you mean 'max_num_seqs'\?\)"),
        ([[1]], {"stop_token_ids": [280]}, r"prompt 0 has stop_token_ids outside 0..279: \[280\]"),
        ([[1], [2]], {"stop_token_ids": [-1]}, r"prompt 1 has stop_token_ids outside 0..279: \[-1\]"),
        ({"a": 1}, {}, "prompts must be a list of prompts, got .*, a dict.*put it in a list"),
        ({(1, 2)}, {}, "prompts must be a list of prompts, got .*, a set, which has no order"),
        (np.array(5), {}, "prompts must be a list of prompts, got the number 5"),
        (jnp.array([3, 4]), {}, "ids of a single prompt in another list"),
        (
            [[[1, 2], [3]]],
            {},
            r"prompt 0 must be text, a list of .* got \[\[1, 2\], \[3\]\]",
        ),
        ([[1], [[2]]], {}, r"prompt 1 must be text"),
        ([np.ones((2, 2), int)], {}, "prompt 0 must be text"),
        ([[True, False]], {}, r"prompt 0 must be text, .* got \[True, False\]"),
        ([np.array([True])], {}, "prompt 0 must be text"),
        ([np.array([1.0])], {}, "prompt 0 must be text"),
        ([{1: 2}], {}, "prompt 0 must be text"),
        ([{1, 2}], {}, "prompt 0 must be text"),
        ([iter([1])], {}, "prompt 0 must be text, .* got <list_iterator"),
        ([bytearray(b"ab")], {}, "prompt 0 must be text"),
    ],
    ids=lambda value: str(value).partition(" at 0x")[0],
)
def test_what_is_no_call(engine, call, prompts, settings, message):
    with pytest.raises(ValueError, match=message):
        getattr(engine, call)(prompts, **settings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"progress": 1}, "progress must be True or False, got 1"),
        ({"record_plans": "yes"}, "record_plans must be True or False, got 'yes'"),
        ({"bound": None}, "bound must be True or False, got None"),
        ({"on_token": 3}, "on_token must be a function of a Token, or None, got 3"),
        ({"on_token": "print", "progress": 0}, "progress must be.*; on_token must be"),
    ],
    ids=str,
)
def test_what_is_no_option(engine, options, message):
    with pytest.raises(ValueError, match=message):
        engine.generate([[1]], **options)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"prompt_tokens": 1.5}, "prompt_tokens must be a whole number, 1 or more, got 1.5"),
        ({"prompt_tokens": True}, "prompt_tokens must be"),
        ({"prompt_tokens": "4"}, "prompt_tokens must be.*, got '4'"),
        ({"prompt_tokens": 96}, "prompt_tokens must be less than the model's context of 96, got 96"),
        ({"prompt_tokens": 4, "new_tokens": "4"}, "new_tokens must be a whole number, 1 or more, got '4'"),
        ({"prompt_tokens": 4, "new_tokens": 0}, "new_tokens must be"),
        ({"prompt_tokens": 4, "max_num_seqs": 2.0}, "max_num_seqs must be 1 or more, got 2.0"),
        ({"prompt_tokens": 4, "max_num_seqs": True}, "max_num_seqs must be 1 or more, got True"),
        (
            {"prompt_tokens": 4, "max_num_seqs": 33},
            "max_num_seqs must be at most the engine's own, 32, got 33",
        ),
        ({"prompt_tokens": 4, "temperature": -1}, "temperature must be a number from 0"),
        ({"prompt_tokens": 4, "sampled": True}, "expected settings among .*, got 'sampled'"),
        ({"prompt_tokens": 4, "max_new_tokens": 9}, "max_new_tokens is called new_tokens here"),
        ({"prompt_tokens": 0, "new_tokens": None}, "prompt_tokens must be.*; new_tokens must be"),
    ],
    ids=str,
)
def test_what_is_no_size_to_warm_up_for(engine, sizes, message):
    with pytest.raises(ValueError, match=message):
        engine.warmup(**sizes)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"host_threads": 1.5}, "host_threads must be 1 or more, got 1.5"),
        ({"host_threads": "2"}, "host_threads must be 1 or more, got '2'"),
        ({"host_threads": True}, "host_threads must be 1 or more, got True"),
        ({"prefill_chunk_size": 64.0}, "prefill_chunk_size must be 16 tokens or more, got 64.0"),
        ({"prefill_chunk_size": None}, "prefill_chunk_size must be 16 tokens or more, got None"),
        ({"profile": 3}, "profile must be a file, a MachineProfile, a HardwareProfile or None, got 3"),
        ({"profile": {}}, "profile must be"),
        ({"predictor": 3}, "predictor must be a name or an object with bind and predict.*got 3"),
        ({"predictor": "magic"}, "predictor must be one of .* got 'magic'"),
        ({"policy": 3}, "policy must be one of .* got 3"),
        ({"policy": ["lru"]}, r"policy must be one of .* got \['lru'\]"),
        ({"emulated_link_bandwidth": 1.5}, "emulated_link_bandwidth must be a size such as .* got 1.5"),
        ({"emulated_link_bandwidth": "0"}, "emulated_link_bandwidth must be more than 0"),
        ({"device_budget": [1]}, r"device_budget must be a size such as .* got \[1\]"),
        ({"numerics": None}, "numerics must be 'auto', 'exact' or 'fast', got None"),
        ({"numerics": np.array(["fast", "exact"])}, "numerics must be 'auto', 'exact' or 'fast', got array"),
        (
            {"numerics": 1, "host_threads": 0, "policy": "x"},
            "policy must.*; numerics must.*; host_threads",
        ),
    ],
    ids=str,
)
def test_what_is_no_configuration(config, message):
    with pytest.raises(ValueError, match=message):
        OffloadConfig(**config)


def test_numbers_of_numpy_are_numbers():
    config = OffloadConfig(
        host_threads=np.int64(1), prefill_chunk_size=np.int32(64), device_budget=np.int64(9)
    )
    assert config.host_threads == 1


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"model": "path"}, "model must be a Model, as layerscope_jax.load gives one, got 'path'"),
        ({"config": {"policy": "lru"}}, "config must be an OffloadConfig or None, got {'policy': 'lru'}"),
        ({"config": "2GiB"}, "config must be an OffloadConfig or None, got '2GiB'"),
        ({"device": "cpu"}, r"device must be one of jax.devices\(\) or None, got 'cpu'"),
        ({"host_device": 1}, r"host_device must be one of jax.devices\(\) or None, got 1"),
        ({"model": None, "device": 0}, "model must be.*; device must be"),
    ],
    ids=str,
)
def test_what_no_engine_is_made_of(parts, message):
    with pytest.raises(ValueError, match=message):
        Engine(**{"model": spelling_model(), **parts})


IDS = [[5, 6, 7], [8, 9, 10]]


@pytest.mark.parametrize(
    "prompts",
    [
        tuple(map(tuple, IDS)),
        np.array(IDS),
        np.array(IDS, np.uint8),
        jnp.array(IDS),
        [np.array(ids) for ids in IDS],
        [jnp.array(ids) for ids in IDS],
        [array.array("i", ids) for ids in IDS],
        [deque(ids) for ids in IDS],
        deque(IDS),
        [range(5, 8), range(8, 11)],
    ],
    ids=lambda prompts: type(prompts).__name__ + type(prompts[0]).__name__,
)
def test_what_is_a_list_of_prompts(engine, prompts):
    """Each row of a matrix is a prompt."""
    requests = make_requests(prompts, {})
    assert encode_prompts(requests, None, 96, 280) == IDS


def test_settings_beside_requests_are_for_the_others(engine):
    mixed = make_requests([Request(prompt=[1], seed=9), [2], "a"], {"seed": 4, "temperature": 1.0})
    assert [request.seed for request in mixed] == [9, 4, 4]
    assert [request.temperature for request in mixed] == [0.0, 1.0, 1.0]


def test_an_engine_that_refused_goes_on(engine):
    expected = engine.generate(PROMPTS, max_new_tokens=3).token_ids
    for bad in ({"on_token": 3}, {"max_num_seqs": "3"}, {"temprature": 1}):
        with pytest.raises(ValueError, match=r"must be|expected"):
            engine.generate(PROMPTS, **bad)
    assert engine.generate(PROMPTS, max_new_tokens=3).token_ids == expected


class Watching:
    """A tokenizer that says how long the texts were that it was given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.lengths = tokenizer, []

    def encode(self, text, add_special_tokens=True):
        self.lengths.append(len(text))
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)


def spaces_tokenizer(normalizer=None):
    """Knows runs of up to a thousand spaces as one token."""
    vocabulary = {"a": 0, "[UNK]": 1, " ": 2}
    merges, run = [], 1
    while run < 1024:
        vocabulary[" " * 2 * run] = len(vocabulary)
        merges.append((" " * run, " " * run))
        run *= 2
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="[UNK]"))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return tokenizer


def test_a_text_far_too_long_is_not_tokenised_whole():
    watching = Watching(byte_tokenizer())
    text = "A sentence, as they come. " * 200_000
    with pytest.raises(ValueError, match=r"prompt 0 has more than 96 tokens; the model.*shorten it"):
        encode_prompts([Request(prompt=text)], watching, 96, 280)
    assert max(watching.lengths) < 20_000 < len(text)


@pytest.mark.parametrize("size", [0, 10, 94, 95, 96, 97, 1000, 17_000, 80_000])
def test_a_text_is_taken_or_refused_as_if_it_were_tokenised_whole(size):
    watching = Watching(byte_tokenizer())
    found = encode_within(watching, "a" * size, 96)
    if found is None:
        assert size > 96
    else:
        assert found == byte_tokenizer().encode("a" * size).ids
        assert size <= 97 or len(found) == size


@pytest.mark.parametrize(
    ("tokenizer", "text"),
    [
        (spaces_tokenizer(), " " * 90_000),
        (spaces_tokenizer(), "a" + " " * 60_000 + "a"),
        (spaces_tokenizer(normalizers.Strip()), " " * 300_000 + "a" + " " * 300_000),
        (spaces_tokenizer(normalizers.Replace("b", "")), "b" * 300_000 + "a"),
        (spaces_tokenizer(normalizers.NFKC()), "a" + " " * 64_000),
    ],
    ids=["spaces", "between", "stripped", "dropped", "folded"],
)
def test_no_text_that_fits_is_refused(tokenizer, text):
    """However many characters a token has, or the tokenizer drops."""
    ids = tokenizer.encode(text).ids
    assert len(ids) < 96
    assert encode_within(tokenizer, text, 96) == ids


class Ids(np.ndarray):
    """Ids that may be counted, not looked at."""

    def __iter__(self):
        raise AssertionError("looked at one by one")


def test_many_ids_are_not_looked_at_one_by_one():
    ids = np.zeros(1000, np.int32).view(Ids)
    with pytest.raises(ValueError, match="prompt 0 has 1000 tokens"):
        encode_prompts([Request(prompt=ids)], None, 96, 280)


def test_a_tracer_is_no_prompt(engine):
    with pytest.raises(ValueError, match="in a function that JAX traces"):
        jax.jit(lambda ids: engine.generate([ids], max_new_tokens=2))(jnp.array([1, 2]))
    assert engine.generate([[1, 2]], max_new_tokens=2).token_ids
