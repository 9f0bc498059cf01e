"""Events of streams, a tally of the engine's work, and the steps' thread, without an engine."""

import json

from helpers import byte_tokenizer

from layerscope_jax.generation.completions import Token, TokenLogprobs
from layerscope_jax.generation.requests import Request
from layerscope_jax.generation.tool_formats import FORMATS
from layerscope_jax.runtime.accounts import Account
from layerscope_jax.runtime.sampling import NO_TOKEN
from layerscope_jax.serving.bodies import Asked
from layerscope_jax.serving.chunks import Answer
from layerscope_jax.serving.tools import Tools
from layerscope_jax.serving.totals import Tally


def token(text, finish=None, index=0, logprobs=None, stop=None):
    return Token(0, 65, text, finish, index=index, logprobs=logprobs, stop_reason=stop)


def choices(data):
    events = [json.loads(event.removeprefix("data: ")) for event in data.decode().split("\n\n")[:-1]]
    return [choice for event in events for choice in event["choices"]]


def answer(**asked):
    request = Request(prompt=[1], seed=0, temperature=1, n=2)
    return Answer(Asked(requests=[request], **asked), "id", "m", 0, byte_tokenizer())


def test_tokens_that_came_together_are_one_event():
    stream = answer(chat=True, stream=True)
    news = [(0, token("a")), (1, token("x")), (0, token("b", "stop", stop="."))]
    assert choices(stream.events(news)) == [
        {
            "index": 0,
            "delta": {"role": "assistant", "content": "ab"},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": ".",
        },
        {"index": 1, "delta": {"role": "assistant", "content": "x"}, "logprobs": None, "finish_reason": None},
    ]
    assert choices(stream.events([(1, token("", "length"))]))[0]["delta"] == {}


def test_calls_of_tools_are_told_as_such():
    """Whole, and as deltas of a stream; each sample's are its own."""
    tools = Tools(FORMATS["hermes"], {})
    parts = ["We", "ll.\n<tool", '_call>{"name": "f", "arguments": {"x": ', "1}}</tool_call>", ""]
    news = [(0, token(part, "stop" if not part else None)) for part in parts]
    stream = answer(chat=True, stream=True, tools=tools)
    deltas = [choice for part in news for choice in choices(stream.events([part]))]
    assert [delta["delta"].get("content") for delta in deltas] == ["We", "ll.", None, None]
    [call] = deltas[2]["delta"]["tool_calls"]
    assert (call["index"], call["type"]) == (0, "function")
    assert call["function"] == {"name": "f", "arguments": '{"x": 1}'}
    assert [delta["finish_reason"] for delta in deltas] == [None, None, None, "tool_calls"]
    [plain] = choices(stream.events([(1, token("no call", "stop"))]))
    assert (plain["delta"]["content"], plain["finish_reason"]) == ("no call", "stop")
    whole = answer(chat=True, tools=tools)
    body = json.loads(whole.whole([*news, (1, token("no call", "stop", index=1))], 5, 0))
    first, second = body["choices"]
    assert (first["message"]["content"], first["finish_reason"]) == ("Well.", "tool_calls")
    assert [call["function"]["name"] for call in first["message"]["tool_calls"]] == ["f"]
    assert second["message"]["content"] == "no call"
    assert "tool_calls" not in second["message"]


def test_a_token_without_text_is_no_event_unless_it_tells_something():
    stream = answer(chat=False, stream=True)
    assert stream.events([(0, token(""))]) == b""
    told = TokenLogprobs(-0.5)
    for offset in (0, 1):
        [choice] = choices(stream.events([(0, token("", logprobs=told))]))
        assert choice["logprobs"]["text_offset"] == [offset]
    assert stream.usage(3, 0) == b""


def test_ids_are_told_with_every_token():
    """Of a prompt once: with the first chunk of each choice of a text, and of a chat before its choices."""
    stream = answer(chat=False, stream=True, token_ids=True)
    [first, other] = choices(stream.events([(0, token("")), (1, token("x")), (0, token("a"))]))
    assert (first["token_ids"], first["prompt_token_ids"], first["text"]) == ([65, 65], [1], "a")
    assert (other["token_ids"], other["prompt_token_ids"]) == ([65], [1])
    [more] = choices(stream.events([(0, token(""))]))  # without text
    assert more["token_ids"] == [65]
    assert "prompt_token_ids" not in more
    [end] = choices(stream.events([(0, Token(0, NO_TOKEN, "", "abort"))]))
    assert end["token_ids"] == []
    chat = answer(chat=True, stream=True, token_ids=True)
    events = [chat.events([(choice, token("a"))]).decode() for choice in (0, 1, 0)]
    told = [json.loads(event.removeprefix("data: ")) for event in events]
    assert [chunk.get("prompt_token_ids") for chunk in told] == [[1], None, None]
    assert [chunk["choices"][0]["token_ids"] for chunk in told] == [[65]] * 3


def test_counts_of_tokens_only_if_asked_for():
    stream = answer(chat=False, stream=True, include_usage=True)
    assert json.loads(stream.events([(0, token("a"))])[6:])["usage"] is None
    last = json.loads(stream.usage(3, 1)[6:])
    assert last["choices"] == []
    assert last["usage"] == {
        "prompt_tokens": 1,
        "completion_tokens": 3,
        "total_tokens": 4,
        "prompt_tokens_details": {"cached_tokens": 1},
    }


def test_a_tally_adds_one_run_after_another():
    tally, first, second = Tally(), Account(), Account()
    for account, hits, total in ((first, 1, 1), (first, 3, 3), (second, 0, 3), (second, 2, 5)):
        account.meter.expert_hits = account.link.demand_bytes = hits
        tally.update(account)
        assert tally.totals.expert_hits == tally.totals.demand_bytes == total
