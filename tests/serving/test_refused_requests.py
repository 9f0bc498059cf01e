"""What is wrong with a request is said in OpenAI's form, and costs nobody else."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
from serving_calls import JSON, get, metric, post, request, rest, sent, until

from layerscope_jax.support.errors import TransferError

pytestmark = pytest.mark.usefixtures("quick_compiles")

GOOD = {"prompt": "x", "max_tokens": 2, "temperature": 0}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"prompt": ', "expected a JSON object, got Expecting value"),
        (b"\xff", "expected text in UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        ([], "the body must be a JSON object"),
        (GOOD | {"temprature": 1}, "unknown key 'temprature'"),
        (GOOD | {"temperature": -1, "n": 0}, "temperature must be .*; n must be|n must be .*; temperature"),
        (GOOD | {"max_tokens": 0}, "max_tokens must be a whole number"),
        (GOOD | {"stream": 1}, "stream must be true or false, got 1"),
        (GOOD | {"stream_options": {}}, "stream_options must be left out unless stream is true"),
        (GOOD | {"stream": True, "stream_options": {"a": 1}}, "stream_options must be"),
        (GOOD | {"prompt": ["a", 3]}, "prompt must be text or a list of token ids"),
        (GOOD | {"prompt": []}, "prompt is empty"),
        (GOOD | {"prompt": "x" * 96}, "the prompt has 96 tokens; the model's context holds 96"),
        (GOOD | {"prompt": ["x"] * 10}, "at most 8 in all"),
        (GOOD | {"prompt": [300]}, "outside 0..279"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bodies(server, body, message):
    status, _, answer = post(server, body)
    assert status == 400
    assert answer["error"]["type"] == "invalid_request_error"
    with pytest.raises(ValueError, match=message):
        raise ValueError(answer["error"]["message"])


def test_paths_methods_and_types(server):
    assert get(server, "/v1/embeddings")[0] == 404
    status, headers, answer = get(server, "/v1/completions")
    assert (status, headers["allow"], answer["error"]["code"]) == (405, "POST", None)
    status, _, answer = post(server, GOOD, headers=JSON | {"Content-Type": "text/plain"})
    assert (status, answer["error"]["message"]) == (415, "the header Content-Type must be application/json")
    assert get(server, "/health", headers={})[0] == 200
    assert post(server, GOOD, headers={"Content-Type": "application/json"})[0] == 401
    assert post(server, GOOD, headers=JSON | {"Authorization": "Bearer sécret"})[0] == 401


def test_a_body_that_is_too_large(server):
    """Whether its length is told or not."""
    status, _, answer = post(server, b" " * 10_000_000)
    assert (status, answer["error"]["message"]) == (413, "the body must have at most 4,194,304 bytes")
    head = request({}, 0).partition(b"Content-Length")[0] + b"Transfer-Encoding: chunked\r\n\r\n"
    chunk = b"100000\r\n" + b" " * 2**20 + b"\r\n"
    with sent(server, head + chunk * 5) as connection:
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")
    assert post(server, GOOD)[0] == 200


@pytest.mark.parametrize(
    "part", [b"", b"POST /v1/comp", request(GOOD, length=1000)], ids=["none", "head", "body"]
)
def test_half_a_request(server, part):
    answer = rest(sent(server, part))
    if part:
        assert answer.startswith(b"HTTP/1.1 408 ")
    if b"prompt" in part:
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"].startswith(
            "the request did not"
        )
    assert post(server, GOOD)[0] == 200


def test_what_is_no_http(server):
    assert rest(sent(server, b"\x16\x03\x01 hello\r\n\r\n")).startswith(b"HTTP/1.1 400 ")


def test_a_flood(engine, server):
    """Two run, six wait, and the others are told to come again."""
    with ThreadPoolExecutor(12) as threads:
        with engine._turns.turn():  # no step runs meanwhile
            answers = [threads.submit(post, server, GOOD) for _ in range(8)]
            until(lambda: server._service._taken == 8 and len(server._service._jobs) == 8)
            assert metric(server, "vllm:num_requests_waiting") == 8
            for _ in range(3):
                status, headers, answer = post(server, GOOD)
                assert (status, headers["retry-after"]) == (429, "1")
                assert answer["error"]["code"] == "rate_limit_exceeded"
        assert [answer.result()[0] for answer in answers] == [200] * 8
    until(lambda: server._service.is_idle)


def test_a_client_that_takes_nothing(server):
    """It is left after a while, with most of its answer; nobody waits for it."""
    size = server._socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    server._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # connections take it over
    try:
        body = GOOD | {"prompt": ["x"] * 6, "max_tokens": 60, "logprobs": 20, "ignore_eos": True}
        connection = sent(server, request(body | {"stream": True}), room=4096)
    finally:
        server._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size // 2)  # which Linux doubles
    until(lambda: not server._service.is_idle)
    assert post(server, GOOD)[0] == 200
    until(lambda: server._service.is_idle)
    assert b"[DONE]" not in rest(connection)


def test_a_step_that_fails(engine, server, monkeypatch):
    def fails(*_):
        raise TransferError("no link")

    for stream in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(engine.runner, "step", fails)
            status, _, answer = post(server, GOOD | {"stream": stream})
        assert status == 500
        assert answer["error"] == {
            "message": "the engine failed: TransferError: no link",
            "type": "server_error",
            "param": None,
            "code": None,
        }
        assert post(server, GOOD)[0] == 200
