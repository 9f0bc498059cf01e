"""Requests of OpenAI's API mean what the API says, and their answers look as they do there."""

import json

import pytest
from helpers import byte_tokenizer

from layerscope_jax.generation.completions import Output, TokenLogprobs
from layerscope_jax.generation.openai_answers import answer, refused
from layerscope_jax.generation.openai_requests import CHAT_URL, TEXT_URL, is_openai, translated
from layerscope_jax.generation.requests import Request

MESSAGES = [{"role": "user", "content": "Hi"}]

TEXT_PART = {"type": "text", "text": "Hi"}


def line(url=TEXT_URL, custom_id="a", **body):
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (line(prompt="x"), {"prompt": "x", "max_new_tokens": 16}),
        (line(prompt=[1, 2], max_tokens=3), {"prompt": [1, 2], "max_new_tokens": 3}),
        (line(prompt=["x"], logprobs=2, stop="\n"), {"prompt": "x", "logprobs": 2, "stop": "\n"}),
        (line(prompt=[[1, 2]], echo=False, best_of=1, suffix=None, user="u"), {"prompt": [1, 2]}),
        (
            line(CHAT_URL, messages=MESSAGES, max_completion_tokens=9, n=2, temperature=0.5, top_p=0.9),
            {"messages": MESSAGES, "max_new_tokens": 9, "n": 2, "temperature": 0.5, "top_p": 0.9},
        ),
        (line(CHAT_URL, messages=MESSAGES, logprobs=True), {"messages": MESSAGES, "logprobs": 0}),
        (line(CHAT_URL, messages=MESSAGES, logprobs=False), {"messages": MESSAGES}),
        (
            line(CHAT_URL, messages=[{"role": "user", "content": [TEXT_PART, TEXT_PART]}]),
            {"messages": [{"role": "user", "content": "Hi\nHi"}]},
        ),
        (
            line(CHAT_URL, messages=MESSAGES, logprobs=True, top_logprobs=4, logit_bias={"7": -100}, seed=5),
            {"messages": MESSAGES, "logprobs": 4, "logit_bias": {7: -100}, "seed": 5},
        ),
        (
            line(
                CHAT_URL,
                messages=MESSAGES,
                model="gpt",
                stream=False,
                response_format={"type": "text"},
                tools=[{"type": "function"}],
                tool_choice="auto",
                reasoning_effort="low",
                chat_template_kwargs={"enable_thinking": False},
            ),
            {
                "messages": MESSAGES,
                "tools": [{"type": "function"}],
                "chat_template_kwargs": {"reasoning_effort": "low", "enable_thinking": False},
            },
        ),
        (
            line(prompt="x", response_format={"type": "json_object"}),
            {"prompt": "x", "json_schema": {"type": "object"}},
        ),
        (
            line(
                prompt="x", response_format={"type": "json_schema", "json_schema": {"schema": {"enum": [1]}}}
            ),
            {"prompt": "x", "json_schema": {"enum": [1]}},
        ),
        (
            line(prompt="x", top_k=-1, min_p=0.1, repetition_penalty=1.2, min_tokens=3, ignore_eos=True),
            {
                "prompt": "x",
                "top_k": -1,
                "min_p": 0.1,
                "repetition_penalty": 1.2,
                "min_new_tokens": 3,
                "ignore_eos": True,
            },
        ),
    ],
    ids=str,
)
def test_bodies(content, expected):
    """A temperature that is not said is 1, and a seed is drawn, as in the API."""
    assert is_openai(content)
    request, call = translated(content, {})
    assert call.refusal is None
    length = 1024 if "messages" in expected else 16
    defaults = {"temperature": 1.0, "seed": None, "max_new_tokens": length}
    assert request == Request(**defaults | expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (line(prompt="x", custom_id=None), "custom_id must be a text, got None"),
        ({"custom_id": "a", "url": TEXT_URL}, "body must be an object, got None"),
        (line("/v1/embeddings", input="x"), "url must be /v1/chat/completions or /v1/completions, got"),
        (line(["x"], prompt="x"), "url must be"),
        (line(prompt="x") | {"method": "GET"}, "method must be POST, got 'GET'"),
        (line(prompt="x") | {"extra": 1}, "unknown key 'extra'"),
        (line(), "prompt must be text or a list of token ids; one prompt a line, got None"),
        (line(prompt=["x", "y"]), "prompt must be .*; one prompt a line"),
        (line(prompt="\ud800"), "half a surrogate pair"),
        (line(prompt="x", messages=MESSAGES), "unknown key 'messages' of the body"),
        (line(CHAT_URL, prompt="x"), "unknown key 'prompt' of the body; messages must be a conversation"),
        (line(prompt="x", temprature=1), "unknown key 'temprature' of the body"),
        (line(prompt="x", stream=True), "stream must be false, got True"),
        (line(prompt="x", echo=True, best_of=2), "echo must be false, got True; best_of must be 1, got 2"),
        (line(CHAT_URL, messages=MESSAGES, tool_choice="required"), 'tool_choice must be "none" or "auto"'),
        (
            line(CHAT_URL, messages=MESSAGES, response_format={"type": "xml"}),
            "response_format must be an obj",
        ),
        (line(prompt="x", response_format="json_object"), "response_format must be an object of type"),
        (line(prompt="x", response_format={"type": "json_schema"}), "response_format.json_schema must be"),
        (
            line(prompt="x", response_format={"type": "json_schema", "json_schema": {"schema": {"type": 1}}}),
            "json_schema must be one that llguidance takes",
        ),
        (line(CHAT_URL, messages=MESSAGES, logprobs=3), "logprobs must be true or false, got 3"),
        (line(CHAT_URL, messages=MESSAGES, top_logprobs=3), "logprobs must be true where there are"),
        (line(prompt="x", temperature=-1), "temperature must be a number from 0"),
        (line(prompt="x", temperature=0, n=2), "n must be 1 at temperature 0"),
        (line(CHAT_URL, messages=[]), "messages must be a list of"),
        (
            line(CHAT_URL, messages=[{"role": "user", "content": [TEXT_PART, {"type": "image_url"}]}]),
            "content must be text, or a list of",
        ),
    ],
    ids=str,
)
def test_what_is_refused(content, message):
    _, call = translated(content, {})
    with pytest.raises(ValueError, match=message):
        raise ValueError(call.refusal)


def test_options_are_for_what_a_body_leaves_out():
    options = {"top_k": 3, "max_new_tokens": 7, "temperature": 0.0}
    request, call = translated(line(prompt="x", top_k=3), options)
    assert (request.top_k, request.max_new_tokens, request.temperature) == (3, 7, 0.0)
    with pytest.raises(ValueError, match=r"top_k is 3 in the line and 4 for all lines \(--top-k\)"):
        translated(line(prompt="x", top_k=3), {"top_k": 4})
    assert call.answer_id("m") == translated(line(prompt="x", top_k=3), dict(options))[1].answer_id("m")
    for other in (
        translated(line(prompt="y", top_k=3), options)[1].answer_id("m"),
        translated(line(prompt="x", top_k=3), {"top_k": 3})[1].answer_id("m"),
        call.answer_id("n"),
    ):
        assert other != call.answer_id("m")


TOLD = [TokenLogprobs(-0.5, ((65, -0.5), (2, -1.5))), TokenLogprobs(-0.25, ((278, -0.25),))]


def outputs(**changes):
    fields = {"text": "ab", "token_ids": [65, 278], "finish_reason": "stop", "logprobs": TOLD}
    return [Output(**fields | changes)]


def test_an_answer_to_a_chat():
    _, call = translated(line(CHAT_URL, messages=MESSAGES), {})
    response = answer(call, outputs(), "m", 5, byte_tokenizer())
    assert response["status_code"] == 200
    body = json.loads(json.dumps(response["body"]))
    assert body["object"] == "chat.completion"
    assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
    [choice] = body["choices"]
    assert (choice["index"], choice["finish_reason"], choice["stop_reason"]) == (0, "stop", None)
    assert choice["message"] == {"role": "assistant", "content": "ab", "refusal": None}
    first, end = choice["logprobs"]["content"]
    letter = byte_tokenizer().decode([65])
    assert first["token"] == letter
    assert first["bytes"] == list(letter.encode())
    assert [entry["logprob"] for entry in first["top_logprobs"]] == [-0.5, -1.5]
    assert end == {
        "token": "<eos>",
        "logprob": -0.25,
        "bytes": list(b"<eos>"),
        "top_logprobs": [{"token": "<eos>", "logprob": -0.25, "bytes": list(b"<eos>")}],
    }


def test_an_answer_to_a_text():
    _, call = translated(line(prompt="x"), {})
    [choice] = answer(call, outputs(), "m", 5, byte_tokenizer())["body"]["choices"]
    assert choice["text"] == "ab"
    assert choice["logprobs"]["token_logprobs"] == [-0.5, -0.25]
    assert choice["logprobs"]["text_offset"] == [0, 1]
    assert choice["logprobs"]["top_logprobs"][1] == {"<eos>": -0.25}
    [choice] = answer(call, outputs(logprobs=None), "m", 5, None)["body"]["choices"]
    assert choice["logprobs"] is None


def test_what_went_wrong():
    _, call = translated(line(prompt="x"), {})
    response = answer(call, outputs(finish_reason="error", error="NaN"), "m", 5, None)
    assert response["status_code"] == 500
    assert response["body"]["error"]["message"] == "NaN"
    assert refused(call, "m", "too long")["status_code"] == 400
