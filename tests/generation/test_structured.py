"""Texts by a schema: whatever the model says, they parse, and are what the schema describes."""

import json

import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest
from arithmetic import Arithmetic, jitted, looped
from helpers import EOS, VOCABULARY, byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from layerscope_jax.generation.handles import Handle
from layerscope_jax.generation.requests import Request
from layerscope_jax.generation.structured import Structures
from layerscope_jax.models.rotary import PAD_POSITION

pytestmark = pytest.mark.usefixtures("quick_compiles")

WORD = {"type": "string", "pattern": "^[a-z]{1,4}$"}
SCHEMAS = [
    {"type": "integer", "minimum": -5, "maximum": 99},
    {"enum": ["red", "green", {"a": None}]},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
    {
        "type": "object",
        "properties": {"name": WORD, "tags": {"type": "array", "items": WORD, "maxItems": 2}},
        "required": ["name", "tags"],
        "additionalProperties": False,
    },
    {
        "anyOf": [
            {"const": 7},
            {"type": "array", "prefixItems": [{"const": "☃"}], "items": False, "minItems": 1},
        ]
    },
]
"""None is met by a text of more than a few hundred tokens, or of a last number without an end."""


class Babbling(Arithmetic):
    """A runner whose logits are noise, by all that a row has cached; the last row of a step never is any."""

    def step(self, tokens, positions, last, caches, sampling):
        _, _, caches = super().step(tokens, positions, last, caches, sampling)
        logits, cache = np.zeros((len(tokens), VOCABULARY), np.float32), np.asarray(caches[0].tokens)
        for row, place in enumerate(positions[np.arange(len(tokens)), last]):
            if place != PAD_POSITION:
                said = cache[row, : place + 1].astype(np.int64)
                logits[row] = np.random.default_rng(said).standard_normal(VOCABULARY)
                logits[row, [9, 32, 220]] -= 2  # spaces are too dear to go on for long
        logits = jnp.asarray(logits)
        return jitted(logits, positions[np.arange(len(tokens)), last] + 1, sampling), logits, caches


def babbler():
    made, runner = looped(
        runner=Babbling(), tokenizer=byte_tokenizer(), stop_token_ids=(EOS,), vocab_size=VOCABULARY
    )
    made._model.config.max_position_embeddings = 600
    return made, runner


def submitted(made, request):
    call = made.call([request], [list(request.prompt)], record_plans=False, bound=False)
    handle = Handle(None, made, call)
    made.submit(call)
    return handle


def is_met(schema, output):
    """Whether an output is a whole text that the schema describes."""
    jsonschema.validate(json.loads(output.text), schema)
    assert output.finish_reason == "stop"
    return True


requests = st.builds(
    Request,
    prompt=st.lists(st.integers(0, 255), min_size=1, max_size=4),
    max_new_tokens=st.just(500),
    json_schema=st.sampled_from([None, *SCHEMAS]),
    temperature=st.sampled_from([0.0, 0.7, 3.0]),
    seed=st.integers(0, 9),
    top_k=st.sampled_from([0, 5]),
    frequency_penalty=st.sampled_from([0.0, 1.5]),
)


@given(st.lists(requests, min_size=1, max_size=4), st.sets(st.integers(1, 30), max_size=2))
@settings(deadline=None, max_examples=6)
def test_outputs_are_what_their_schemas_describe(wanted, fails):
    """Also beside requests without, and where steps fail; and each is that of the request alone."""
    made, runner = babbler()
    handles, step = [submitted(made, request) for request in wanted], runner.step

    def failing(*inputs):
        runner.fails = int(runner.steps + 1 in fails)
        return step(*inputs)

    runner.step = failing
    for request, handle in zip(wanted, handles, strict=True):
        if request.json_schema is None:
            handle.cancel()
            continue
        try:
            result = handle.result()
        except OSError:
            continue  # it drove the step that failed
        assert is_met(request.json_schema, result)
        assert submitted(babbler()[0], request).result().token_ids == result.token_ids


def test_samples_and_streams():
    made, _ = babbler()
    schema = SCHEMAS[3]
    handle = submitted(made, Request(prompt=[65], json_schema=schema, n=3, temperature=1, max_new_tokens=500))
    texts = ["", "", ""]
    for token in handle:
        texts[token.index] += token.text
    results = handle.results()
    assert texts == results.texts
    assert all(is_met(schema, output) for output in results)
    assert len(set(texts)) == 3


def test_a_cancelled_request_leaves_the_others_their_states():
    made, _ = babbler()
    first, second = (
        submitted(
            made, Request(prompt=[65], json_schema=SCHEMAS[3], seed=seed, temperature=1, max_new_tokens=500)
        )
        for seed in (1, 2)
    )
    tokens = iter(first)
    for _ in range(4):
        next(tokens)
    first.cancel()
    assert is_met(SCHEMAS[3], second.result())
    cut = first.result()
    assert cut.finish_reason == "abort"
    with pytest.raises(json.JSONDecodeError):
        json.loads(cut.text)


def test_a_text_that_is_cut_off_is_the_beginning_of_one():
    made, _ = babbler()
    schema = {"type": "string", "pattern": "^(ab)*$"}
    cut = submitted(made, Request(prompt=[65], json_schema=schema, max_new_tokens=3)).result()
    assert cut.finish_reason == "length" or cut.text == '""'
    assert '"ab'.startswith(cut.text) or cut.text == '""'


def test_a_grammar():
    made, _ = babbler()
    request = Request(prompt=[65], grammar='start: "yes" | "no"', max_new_tokens=9)
    assert submitted(made, request).result().text in ("yes", "no")


def test_a_model_without_stop_tokens_ends_with_the_text():
    guide = Structures(byte_tokenizer(), VOCABULARY, ()).guide(
        Request(prompt="", grammar='start: "a"').structure
    )
    bits = np.zeros(9, np.int32)
    guide.allow([], bits)
    assert np.unpackbits(bits.view(np.uint8)).sum() == 1
    token = byte_tokenizer().encode("a").ids
    assert guide.is_complete(token)
    guide.allow([*token, *token], bits)
    assert not bits.any()
    assert "cannot be followed any further" in guide.error()
    guide.allow([], bits)  # which begins anew
    assert guide.error() is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"json_schema": {"type": "frog"}},
            r"json_schema must be one that llguidance takes \(Invalid type: frog",
        ),
        ({"json_schema": ["a"]}, "json_schema must be a JSON schema that is an object, or None"),
        ({"json_schema": {"const": object()}}, "json_schema must hold only values that JSON can express"),
        ({"json_schema": {"type": "object", "if": {}}}, "Unimplemented keys"),
        (
            {"json_schema": {"enum": ["x" * 70_000]}},
            "json_schema must have at most 65,536 characters, got 70,0",
        ),
        ({"grammar": "start: nothing"}, "grammar must be one that llguidance takes"),
        ({"grammar": 5}, "grammar must be a text or None"),
        ({"grammar": 'start: "a"', "json_schema": {}}, "either a json_schema or a grammar, got both"),
    ],
    ids=["no type", "a list", "no JSON", "a keyword", "too long", "no grammar", "a number", "both"],
)
def test_what_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Request(prompt="a", **given)


def test_a_schema_that_is_too_complex():
    schema = {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(900)}}
    request = Request(prompt="", json_schema=schema)
    with pytest.raises(ValueError, match=r"the json_schema or grammar cannot be followed: .* max is 2000"):
        Structures(byte_tokenizer(), VOCABULARY, (EOS,)).guide(request.structure)


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(ValueError, match=r"needs llguidance.*pip install 'layerscope-jax\[structured\]'"):
        Request(prompt="a", json_schema={"type": "object"})
    with pytest.raises(ValueError, match="needs a tokenizer, and the model has none"):
        Structures(None, 5, ()).guide("start: ")
