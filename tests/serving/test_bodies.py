"""Bodies: what they ask for, and that whatever they hold, the answer says what is wrong."""

import json

import pytest
from helpers import spelling_model
from hypothesis import given, settings
from hypothesis import strategies as st

from layerscope_jax.generation.chat import Chat
from layerscope_jax.generation.openai_requests import CHAT_URL, LENGTHS, TEXT_URL
from layerscope_jax.generation.structured import Structures
from layerscope_jax.generation.tool_formats import FORMATS
from layerscope_jax.serving.bodies import Asked, Reader
from layerscope_jax.serving.refusals import Refusal

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
KEYS = ("model", "prompt", "messages", "stream", "stream_options", "n", "max_tokens", "temperature", "seed")
MORE = (
    "stop",
    "logprobs",
    "top_logprobs",
    "logit_bias",
    "min_tokens",
    "max_completion_tokens",
    "stop_token_ids",
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=2),
)


@pytest.fixture(scope="module")
def reader():
    chat = Chat(None, TEMPLATE)
    model = spelling_model()
    structures = Structures.of(model)
    yield Reader(model, "tiny", chat, {"top_k": 7}, 50, 6, structures)
    chat.close()


def read(reader, url=TEXT_URL, **body):
    return reader.read(json.dumps(body).encode(), url)


def test_prompts(reader):
    """Several become requests of their own, each with a seed."""
    asked = read(reader, prompt=["ab", [5, 6, 7]], n=2, max_tokens=9, model="tiny")
    assert [list(request.prompt) for request in asked.requests] == [
        list(reader._model.tokenizer.encode("ab").ids),
        [5, 6, 7],
    ]
    assert (asked.samples, asked.prompt_tokens, asked.stream) == (4, 5, False)
    assert {(request.max_new_tokens, request.top_k) for request in asked.requests} == {(9, 7)}
    assert None not in {request.seed for request in asked.requests}


def test_echoes(reader):
    asked = read(reader, prompt=["ab", [5, 6]], echo=True, logprobs=2, max_tokens=0)
    assert asked.echoed == ["ab", reader._model.tokenizer.decode([5, 6])]
    assert asked.without_new
    assert {(request.prompt_logprobs, request.max_new_tokens) for request in asked.requests} == {(2, 1)}
    assert not read(reader, prompt="ab", echo=False).echoed
    with pytest.raises(ValueError, match="echo must be true or false, got 'x'"):
        read(reader, prompt="ab", echo="x")
    with pytest.raises(ValueError, match="max_tokens must be"):
        read(reader, prompt="ab", max_tokens=0)
    with pytest.raises(ValueError, match="echo must be false, got True"):
        read(reader, CHAT_URL, messages=[{"role": "user", "content": "a"}], echo=True)


def test_chats(reader):
    asked = read(
        reader,
        CHAT_URL,
        messages=[{"role": "user", "content": "abc"}],
        stream=True,
        stream_options={"include_usage": True},
        min_tokens=48,
    )
    assert (asked.chat, asked.stream, asked.include_usage, asked.prompt_tokens) == (True, True, True, 3)
    [request] = asked.requests
    assert (request.max_new_tokens, request.min_new_tokens) == (47, 47)  # what is left of 50


TOOLS = [{"type": "function", "function": {"name": name}} for name in ("f", "g")]
MESSAGES = [{"role": "user", "content": "a"}]


@pytest.fixture(scope="module")
def called():
    """A reader for a template that knows tools."""
    chat = Chat(None, "{{ tools | length if tools else 0 }}<tool_call></tool_call>{{ messages | tojson }}")
    model = spelling_model()
    yield Reader(model, "tiny", chat, {}, None, 6, Structures.of(model))
    chat.close()


def chosen(reader, **body):
    asked = read(reader, CHAT_URL, messages=MESSAGES, max_tokens=4, **body)
    [request] = asked.requests
    return asked.tools, reader._model.tokenizer.decode(request.prompt)[0], request.grammar


def test_tools(called):
    """Without a choice calls are read; one may be required, or ruled out."""
    tools, shown, grammar = chosen(called, tools=TOOLS)
    assert (tools.form, shown, grammar) == (FORMATS["hermes"], "2", None)
    assert chosen(called, tools=TOOLS, tool_choice="auto")[0] == tools
    assert chosen(called, tools=TOOLS, tool_choice="none") == (None, "0", None)
    assert chosen(called, tools=TOOLS, tool_choice="required")[2].count("%json") == 2
    named = chosen(called, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "g"}})[2]
    assert r"\"g\"" in named
    assert named.count("%json") == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"tool_choice": "required"}, "tool_choice must be left out without tools"),
        ({"tools": TOOLS, "tool_choice": "some"}, 'tool_choice must be "none", "auto", "required" or'),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "h"}}},
            "tool_choice must be the name of one of the tools",
        ),
        ({"tools": [{"type": "function"}]}, "tools must be "),
        ({"tools": 5}, "tools must be a list of objects"),
        (
            {"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}},
            "either a json_schema or a grammar, got both",
        ),
    ],
    ids=str,
)
def test_tools_that_are_refused(called, reader, body, message):
    with pytest.raises(ValueError, match=message):
        chosen(called, **body)
    with pytest.raises(ValueError, match="the chat template of this model does not support them"):
        chosen(reader, tools=TOOLS)


def test_what_is_wrong_is_said_once_for_all_prompts(reader):
    with pytest.raises(ValueError, match=r"^max_tokens must be [^;]* got 0; n must be [^;]*$") as told:
        read(reader, prompt=["a", "b"], max_tokens=0, n=0)
    assert str(told.value).count("max_tokens") == 1
    with pytest.raises(ValueError, match="at most 6 in all, which run and wait at once, got 8"):
        read(reader, prompt=["a", "b"], n=4)
    with pytest.raises(ValueError, match="prompt 1 has 60 tokens; the model's context holds 50"):
        read(reader, prompt=["a", "b" * 60])
    with pytest.raises(Refusal, match="no model 'gpt'"):
        read(reader, prompt="a", model="gpt")


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(LENGTHS)), st.dictionaries(st.sampled_from(KEYS + MORE), VALUES, max_size=5))
def test_any_body_is_read_or_refused(reader, url, body):
    try:
        asked = read(reader, url, **body)
    except (ValueError, Refusal):
        return
    assert isinstance(asked, Asked)
    assert 1 <= asked.samples <= 6
    assert all(len(request.prompt) + request.max_new_tokens <= 50 for request in asked.requests)
