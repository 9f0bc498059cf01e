"""OpenAI's own client gets the tokens of `engine.generate`, streamed and whole."""

import json

import openai
import pytest
from serving_calls import MODEL, metric, post, request, sent, until

from layerscope_jax.serving.server import Server
from layerscope_jax.serving.settings import ServerConfig

pytestmark = pytest.mark.usefixtures("quick_compiles")

MESSAGES = [{"role": "user", "content": "Hi"}]
GREEDY = {"model": MODEL, "temperature": 0, "max_tokens": 6}
SAMPLED = {"model": MODEL, "temperature": 0.9, "max_tokens": 6, "n": 2, "seed": 5}


def test_texts(engine, client):
    """Of several prompts, each with several samples, in the order of the prompts."""
    prompts = ["Call me", "x"]
    answer = client.completions.create(prompt=prompts, **SAMPLED)
    expected = engine.generate(prompts, temperature=0.9, max_new_tokens=6, n=2, seed=5)
    assert [choice.text for choice in answer.choices] == expected.texts
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.finish_reason for choice in answer.choices] == [c.finish_reason for c in expected]
    new = sum(len(completion.token_ids) for completion in expected)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (8, new)
    assert answer.usage.total_tokens == 8 + new
    assert answer.model == MODEL


def test_streams_are_the_same_texts(client):
    whole = client.completions.create(prompt="Call me", **SAMPLED)
    texts, reasons = ["", ""], [None, None]
    stream = client.completions.create(prompt="Call me", stream=True, **SAMPLED)
    chunks = list(stream)
    for chunk in chunks:
        [choice] = chunk.choices
        assert reasons[choice.index] is None
        texts[choice.index] += choice.text
        reasons[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert len({chunk.id for chunk in chunks}) == 1
    assert len(chunks) > 4  # not all at once


def test_a_chat(engine, client):
    answer = client.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=2, **GREEDY)
    [expected] = engine.generate(["user: Hi\n"], max_new_tokens=6, logprobs=2)
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    assert [token.logprob for token in choice.logprobs.content] == [at.logprob for at in expected.logprobs]
    assert [len(token.top_logprobs) for token in choice.logprobs.content] == [2] * 6
    stream = client.chat.completions.create(
        messages=MESSAGES,
        logprobs=True,
        top_logprobs=2,
        stream=True,
        stream_options={"include_usage": True},
        **GREEDY,
    )
    *chunks, last = stream
    assert last.choices == []
    assert last.usage == answer.usage
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert "".join(delta.content or "" for delta in deltas) == expected.text
    told = [token for chunk in chunks for token in chunk.choices[0].logprobs.content]
    assert told == choice.logprobs.content


def test_log_probabilities_of_a_text(client):
    whole = client.completions.create(prompt="Call me", logprobs=1, **GREEDY).choices[0].logprobs
    chunks = list(client.completions.create(prompt="Call me", logprobs=1, stream=True, **GREEDY))
    for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        parts = [part for chunk in chunks for part in getattr(chunk.choices[0].logprobs, name)]
        assert parts == getattr(whole, name)
    assert len(whole.tokens) == 6


CALLED = "{{ messages[-1].content }}{% if tools %}{% endif %}{# <tool_call></tool_call> #}"


def test_a_call_of_a_tool(engine):
    """Which is required here: a random model makes none by itself."""
    schema = {"type": "object", "properties": {}, "additionalProperties": False}
    tools = [{"type": "function", "function": {"name": name, "parameters": schema}} for name in "fg"]
    settings = GREEDY | {"max_tokens": 90, "tools": tools, "tool_choice": "required"}
    config = ServerConfig(port=0, served_model_name=MODEL)
    with (
        Server(engine, config, CALLED) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        [choice] = client.chat.completions.create(messages=MESSAGES, **settings).choices
        chunks = list(client.chat.completions.create(messages=MESSAGES, stream=True, **settings))
    [call] = choice.message.tool_calls
    assert call.function.name in "fg"
    assert json.loads(call.function.arguments) == {}
    assert (choice.message.content, choice.finish_reason) == (None, "tool_calls")
    [told] = [told for chunk in chunks for told in chunk.choices[0].delta.tool_calls or []]
    assert told.function.model_dump() == call.function.model_dump()
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_a_stop_string(engine, client):
    [expected] = engine.generate(["Call me"], max_new_tokens=6)
    stop = expected.text[2]
    for stream in (False, True):
        answer = client.completions.create(prompt="Call me", stop=stop, stream=stream, **GREEDY)
        chunks = list(answer) if stream else [answer]
        assert "".join(chunk.choices[0].text for chunk in chunks) == expected.text.partition(stop)[0]
        assert chunks[-1].choices[0].finish_reason == "stop"
        assert chunks[-1].choices[0].stop_reason == stop


def test_json_by_a_schema(engine, client):
    """The same streamed and whole, and as of the library."""
    schema = {"type": "array", "items": {"enum": ["red", "green"]}, "minItems": 1, "maxItems": 2}
    format = {"type": "json_schema", "json_schema": {"name": "colours", "schema": schema}}
    settings = SAMPLED | {"max_tokens": 60}
    answer = client.chat.completions.create(messages=MESSAGES, response_format=format, **settings)
    texts = [choice.message.content for choice in answer.choices]
    assert all({"red", "green"} >= set(json.loads(text)) != set() for text in texts)
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}
    stream = client.chat.completions.create(
        messages=MESSAGES, response_format=format, stream=True, **settings
    )
    streamed = ["", ""]
    for chunk in stream:
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    prompt = ["user: Hi\n"]
    library = engine.generate(prompt, json_schema=schema, max_new_tokens=60, temperature=0.9, n=2, seed=5)
    assert streamed == texts == library.texts
    bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "frog"}}}
    with pytest.raises(openai.BadRequestError, match="Invalid type: frog"):
        client.completions.create(prompt="x", extra_body={"response_format": bad}, **GREEDY)


def test_a_shared_prefix_is_computed_once(engine, server, client):
    """And counted where the tokens are, and in the metrics."""
    queries, hits = (metric(server, f"vllm:prefix_cache_{name}_total") for name in ("queries", "hits"))
    prompt = "It is a truth universally acknowledged"
    counts = []
    for end in (".", ", that"):
        answer = client.completions.create(prompt=prompt + end, **GREEDY)
        counts.append(answer.usage.prompt_tokens_details.cached_tokens)
        [plain] = engine.generate([prompt + end], max_new_tokens=6)
        assert answer.choices[0].text == plain.text
    assert counts == [0, len(prompt)]
    assert metric(server, "vllm:prefix_cache_queries_total") - queries == 2 * len(prompt) + 7
    assert metric(server, "vllm:prefix_cache_hits_total") - hits == len(prompt)


def test_prompts_with_their_logprobs(engine, server, client):
    """As lm-eval's `local-completions` asks for them: of ids, echoed, with a token or none behind."""
    prompts = [[5, 6, 7, 200], [90, 91, 92]]
    body = {"model": MODEL, "prompt": prompts, "temperature": 0, "logprobs": 1, "seed": 1234, "echo": True}
    expected = engine.generate(prompts, max_new_tokens=1, logprobs=1, prompt_logprobs=1)
    for count in (1, 0):
        status, _, answer = post(server, body | {"max_tokens": count})
        assert status == 200
        assert answer["usage"]["completion_tokens"] == 2 * count
        for choice, prompt, one in zip(answer["choices"], prompts, expected, strict=True):
            told = choice["logprobs"]
            assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
            own = [at.logprob for at in [*one.prompt_logprobs[1:], *one.logprobs[:count]]]
            assert told["token_logprobs"][1:] == pytest.approx(own, abs=1e-4)
            assert [max(top.values()) for top in told["top_logprobs"][1 : len(prompt)]] == pytest.approx(
                [at.top[0][1] for at in one.prompt_logprobs[1:]], abs=1e-4
            )
            assert choice["text"] == engine.model.tokenizer.decode(prompt) + one.text * count
            assert len(told["tokens"]) == len(told["text_offset"]) == len(prompt) + count
    whole = client.completions.create(prompt="Call me", echo=True, logprobs=0, **SAMPLED)
    stream = client.completions.create(prompt="Call me", echo=True, logprobs=0, stream=True, **SAMPLED)
    texts, tokens = ["", ""], [[], []]
    for chunk in stream:
        [choice] = chunk.choices
        texts[choice.index] += choice.text
        tokens[choice.index] += choice.logprobs.tokens if choice.logprobs else []
    assert texts == [choice.text for choice in whole.choices]
    assert all(text.startswith("Call me") for text in texts)
    assert tokens == [choice.logprobs.tokens for choice in whole.choices]


def test_token_ids(engine, client):
    """As vLLM tells them: of texts with each choice, of a chat's prompt once for all."""
    told = {"extra_body": {"return_token_ids": True}}
    prompts = ["Call me", "x"]
    expected = engine.generate(prompts, temperature=0.9, max_new_tokens=6, n=2, seed=5)
    whole = client.completions.create(prompt=prompts, **SAMPLED, **told)
    assert [choice.token_ids for choice in whole.choices] == expected.token_ids
    decoded = [engine.model.tokenizer.decode(choice.prompt_token_ids) for choice in whole.choices]
    assert decoded == ["Call me", "Call me", "x", "x"]
    streamed = [[], [], [], []]
    for chunk in client.completions.create(prompt=prompts, stream=True, **SAMPLED, **told):
        streamed[chunk.choices[0].index] += chunk.choices[0].token_ids
    assert streamed == expected.token_ids
    echoed = client.completions.create(prompt="x", echo=True, **GREEDY | {"max_tokens": 0}, **told).choices[0]
    assert (echoed.text, echoed.token_ids) == ("x", [])
    chat = client.chat.completions.create(messages=MESSAGES, **GREEDY, **told)
    [greedy] = engine.generate(["user: Hi\n"], max_new_tokens=6)
    assert chat.choices[0].token_ids == greedy.token_ids
    assert engine.model.tokenizer.decode(chat.prompt_token_ids) == "user: Hi\n"
    plain = client.completions.create(prompt="x", **GREEDY).choices[0]
    assert not hasattr(plain, "token_ids")
    with pytest.raises(openai.BadRequestError, match="return_token_ids must be true or false, got 'x'"):
        client.completions.create(prompt="x", extra_body={"return_token_ids": "x"}, **GREEDY)


def test_models(client):
    [model] = client.models.list()
    assert model.id == MODEL
    assert client.models.retrieve(MODEL) == model
    with pytest.raises(openai.NotFoundError, match="no model 'gpt' is served, only 'org/tiny'"):
        client.models.retrieve("gpt")
    with pytest.raises(openai.NotFoundError, match="no model 'gpt'"):
        client.completions.create(model="gpt", prompt="x")


def test_a_wrong_key(server):
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="guessed", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError, match="with the server's key"),
    ):
        stranger.completions.create(prompt="x", **GREEDY)


LONG = {"prompt": "Call me", "temperature": 0, "max_tokens": 50, "ignore_eos": True}


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(engine, server, stream):
    """At the next step, which here comes only after the server has noticed."""
    aborted = {"name": "vllm:request_success_total", "finished_reason": "abort"}
    made, before = metric(server, "vllm:generation_tokens_total"), metric(server, **aborted)
    with sent(server, request(LONG | {"stream": stream})) as connection:
        until(lambda: metric(server, "vllm:num_requests_running") == 1)
        with engine._turns.turn():
            connection.close()
            until(lambda: server._service.is_idle)
    until(lambda: metric(server, **aborted) == before + 1)
    assert metric(server, "vllm:num_requests_running") == 0
    assert metric(server, "vllm:generation_tokens_total") - made < 50
