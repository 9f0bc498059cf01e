"""Calls of tools: each family's are read as it writes them, however their text is cut, or required."""

import json
from itertools import pairwise

import pytest
from helpers import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from layerscope_jax.generation.requests import Request
from layerscope_jax.generation.tool_calls import stream_of
from layerscope_jax.generation.tool_formats import (
    FORMATS,
    ToolCall,
    format_of,
    grammar_of_call,
    has_special,
    parameters,
    wide,
)

CITY = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": CITY}} for name in ("weather", "news")]
TYPES = {"weather": CITY["properties"], "news": CITY["properties"]}
ARGUMENTS = '{"city": "Oslo", "days": 2}'
BOTH = [("weather", ARGUMENTS), ("news", "{}")]

PARTS = {
    "hermes": (
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call>\n',
        '<tool_call>\n{"name": "news", "arguments": {}}\n</tool_call>\n',
    ),
    "qwen_coder": (
        "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n",
        "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>\n",
        "<tool_call>\n<function=news>\n</function>\n</tool_call>",
    ),
    "glm": (
        "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n",
        "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call><tool_call>news\n</tool_call>",
    ),
    "minimax": (
        '<minimax:tool_call>\n<invoke name="weather">\n<parameter name="city">Oslo</parameter>\n',
        '<parameter name="days">2</parameter>\n</invoke>\n',
        '<invoke name="news">\n</invoke>\n</minimax:tool_call>',
    ),
    "deepseek_v3": (
        wide("<|tool_calls_begin|><|tool_call_begin|>function<|tool_sep|>weather\n```json\n"),
        wide('{"city": "Oslo", "days": 2}\n```<|tool_call_end|>\n'),
        wide("<|tool_call_begin|>function<|tool_sep|>news\n```json\n{}\n```<|tool_call_end|>"),
        wide("<|tool_calls_end|>"),
    ),
    "deepseek_v31": (
        wide("<|tool_calls_begin|><|tool_call_begin|>weather<|tool_sep|>"),
        wide('{"city": "Oslo", "days": 2}<|tool_call_end|>'),
        wide("<|tool_call_begin|>news<|tool_sep|>{}<|tool_call_end|><|tool_calls_end|>"),
    ),
    "kimi": (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0",
        '<|tool_call_argument_begin|>{"city": "Oslo", "days": 2}<|tool_call_end|>',
        "<|tool_call_begin|>functions.news:1<|tool_call_argument_begin|>{}<|tool_call_end|>",
        "<|tool_calls_section_end|>",
    ),
    "mistral": (
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}, ',
        '{"name": "news", "arguments": {}}]',
    ),
    "mistral_args": (
        '[TOOL_CALLS]weather[ARGS]{"city": "Oslo", "days": 2}',
        "[TOOL_CALLS]news[ARGS]{}",
    ),
    "harmony": (
        "<|end|><|start|>assistant<|channel|>commentary to=functions.weather ",
        '<|constrain|>json<|message|>{"city": "Oslo", "days": 2}<|call|>',
        "<|start|>assistant<|channel|>commentary to=functions.news <|constrain|>json<|message|>{}",
    ),
}
THOUGHT = "<|channel|>analysis<|message|>Oslo?<|end|><|start|>assistant<|channel|>commentary<|message|>"
ANSWERS = {
    name: (THOUGHT if name == "harmony" else "") + "Let me see." + "".join(parts)
    for name, parts in PARTS.items()
}


def read(name, pieces):
    stream = stream_of(FORMATS[name], TYPES)
    told = [*[stream.add(piece) for piece in pieces], stream.end()]
    return (
        "".join(part.content for part in told),
        [call for part in told for call in part.calls],
        "".join(part.reasoning for part in told),
    )


def pieces_of(text, cuts):
    places = sorted({cut % (len(text) + 1) for cut in cuts} | {0, len(text)})
    return [text[start:end] for start, end in pairwise(places)]


def test_every_format_is_tried():
    assert ANSWERS.keys() == FORMATS.keys()


@given(st.sampled_from(sorted(ANSWERS)), st.lists(st.integers(0, 1000), max_size=40))
def test_calls_are_read_however_their_text_is_cut(name, cuts):
    content, calls, reasoning = read(name, pieces_of(ANSWERS[name], cuts))
    assert content == "Let me see."
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [
        (called, json.loads(arguments)) for called, arguments in BOTH
    ]
    assert reasoning == ("Oslo?" if name == "harmony" else "")
    if name == "kimi":
        assert calls[0] == ToolCall("weather", ARGUMENTS, "functions.weather:0")


@given(st.sampled_from(sorted(ANSWERS)), st.integers(1, 400), st.lists(st.integers(0, 1000), max_size=20))
def test_an_answer_that_breaks_off_loses_no_text(name, at, cuts):
    """What is no whole call stays content."""
    text = ANSWERS[name][:at]
    whole, cut = read(name, [text]), read(name, pieces_of(text, cuts))
    assert whole == cut
    content, calls, _ = whole
    assert [call.name for call in calls] == ["weather", "news"][: len(calls)]
    if not calls and name != "harmony":
        assert content == text


@given(st.sampled_from(sorted(set(ANSWERS) - {"harmony"})), st.text("<tol_ca>[TOL]|{}\n x", max_size=60))
def test_other_text_stays_what_it_is(name, text):
    content, calls, _ = read(name, list(text))
    assert calls or content == text


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ tools }} <tool_call>{{ call }}</tool_call>", "hermes"),
        ("<tool_call>\n<function=x>\n</function></tool_call>", "qwen_coder"),
        ("<tool_call>{{ name }}<arg_key></arg_key></tool_call>", "glm"),
        (wide("<|tool_calls_begin|>") + "```json", "deepseek_v3"),
        ("[TOOL_CALLS]{{ name }}[ARGS]", "mistral_args"),
        ("[TOOL_CALLS] [", "mistral"),
        ("<|channel|>commentary to=functions.", "harmony"),
        ("{{ messages }}", None),
    ],
)
def test_the_template_says_the_format(template, name):
    assert format_of(template) is (None if name is None else FORMATS[name])


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if form.before])
def test_a_required_call_is_one_that_is_read(name):
    """Where marks are special tokens, the grammar has these tokens and not their letters."""
    form, tokenizer = FORMATS[name], byte_tokenizer()
    assert not has_special(form, tokenizer)
    grammar = grammar_of_call(form, parameters(TOOLS), tokenizer)
    Request(prompt="x", grammar=grammar)  # which refuses what is no grammar
    text = form.before.replace("NAME", "news") + "{}" + form.after
    assert [call.name for call in read(name, [text])[1]] == ["news"]
    tokenizer.add_special_tokens([form.begin])
    assert has_special(form, tokenizer)
    assert f"<[{tokenizer.token_to_id(form.begin)}]>" in grammar_of_call(form, parameters(TOOLS), tokenizer)


def test_what_cannot_be_required_or_is_no_function():
    with pytest.raises(ValueError, match="one by one and not as JSON, so no call can be required"):
        grammar_of_call(FORMATS["glm"], parameters(TOOLS), byte_tokenizer())
    with pytest.raises(ValueError, match="tools must be "):
        parameters([{"type": "function"}])
    with pytest.raises(ValueError, match="tools must be "):
        parameters([{"function": {"name": 'a"b'}}])
