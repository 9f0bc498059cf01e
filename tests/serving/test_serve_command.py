"""The command: it says where it answers, lets running requests end at SIGTERM, and exits with 0."""

import os
import signal
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from compiled_programs import compiled
from helpers import byte_tokenizer, random_decoder, spelling_model
from serving_calls import get, metric, post, request, rest, sent, until

import layerscope_jax
from layerscope_jax.cli import main as cli
from layerscope_jax.cli import serve
from layerscope_jax.serving.server import Server
from layerscope_jax.serving.settings import ServerConfig
from layerscope_jax.support import exits

pytestmark = pytest.mark.usefixtures("quick_compiles")

LONG = {"prompt": "x", "temperature": 0, "max_tokens": 20, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint much like the model of the other tests of serving."""
    folder = tmp_path_factory.mktemp("served")
    config = replace(spelling_model().config, qk_norm="all")
    layerscope_jax.save(random_decoder(config), folder)
    (folder / "tokenizer.json").write_text(byte_tokenizer().to_str())
    return folder


@pytest.fixture
def port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def answers(server):
    return get(server, "/health")[0] == 200


def test_sigterm(folder, capsys, monkeypatch):
    """A request that runs ends as if nothing had been; one that comes then is refused."""
    monkeypatch.setenv(serve.API_KEY, "secret")
    servers, said = [], []

    class Known(Server):
        def __enter__(self):
            super().__enter__()
            servers.append(self)
            return self

    def use():
        until(lambda: servers, 120)
        [server] = servers
        with server._service._engine._turns.turn():  # no step runs meanwhile
            programs = len(compiled)
            connection = sent(server, request(LONG | {"stream": True, "max_tokens": 12}))
            until(lambda: metric(server, "vllm:num_requests_waiting") == 1)
            until(lambda: any("0 requests run, 1 waits; 0.0 tokens/s" in line for line in said))
            os.kill(os.getpid(), signal.SIGTERM)
            # Asked for its health before it ends, it would take requests for a while.
            until(lambda: server._service.refusing)
            assert not answers(server)
            status, headers, answer = post(server, LONG)
        stream = rest(connection)
        assert len(compiled) == programs  # what it needs was compiled before the server answered
        return stream, status, headers["retry-after"], answer["error"]["message"]

    monkeypatch.setattr(serve, "server_class", lambda: Known)
    monkeypatch.setattr(serve, "EVERY_S", 0)
    monkeypatch.setattr(serve, "say", lambda line: (said.append(line), exits.say(line)))
    with ThreadPoolExecutor(1) as threads:
        used = threads.submit(use)
        options = ["--port=0", "--served-model-name=m", "--max-num-seqs=2", "--warmup-tokens=16"]
        code = cli.main(["serve", str(folder), *options])
        stream, *refusal = used.result()
    assert code == 0
    assert refusal == [503, "5", "the server is shutting down"]
    assert stream.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert b'"finish_reason": "length"' in stream
    told = capsys.readouterr().err
    assert f"m answers at {servers[0].url}/v1; Ctrl-C ends it" in told
    assert "running requests are completed" in told
    [answers_at] = [number for number, line in enumerate(said) if "answers at" in line]
    assert all(" 1 waits;" in line for line in said[answers_at + 1 : -1])  # and nothing while it was idle


def test_what_runs_too_long_is_aborted(engine, monkeypatch):
    """A stream ends with what there is, a request for a whole answer is refused."""
    step, steps, gate = engine.runner.step, [], threading.Event()

    def gated(*arguments):
        steps.append(arguments)
        if len(steps) > 5:
            gate.wait(30)
        return step(*arguments)

    monkeypatch.setattr(engine.runner, "step", gated)
    with Server(engine, ServerConfig(port=0, drain_s=0)) as server, ThreadPoolExecutor(3) as threads:
        with engine._turns.turn():  # both come before the first step
            streamed = threads.submit(lambda: rest(sent(server, request(LONG | {"stream": True}))))
            whole = threads.submit(post, server, LONG)
            until(lambda: metric(server, "vllm:num_requests_waiting") == 2)
        until(lambda: metric(server, "vllm:num_requests_running") == 2)
        until(lambda: len(steps) > 5)  # what is to be aborted waits behind a step
        server.drain()
        closed = threads.submit(server.close)
        until(lambda: not server._service._stepper._inbox.empty())
        gate.set()
        closed.result()
        assert b'"finish_reason": "abort"' in streamed.result()
        assert whole.result()[0] == 503
    assert engine.generate(["x"], max_new_tokens=2)[0].finish_reason == "length"


def test_what_is_refused(folder, port, capsys, monkeypatch):
    def said(*options):
        assert cli.main(["serve", str(folder), *options]) == 2
        return capsys.readouterr().err

    assert "port must be a whole number in 0..65535, got 70000" in said("--port=70000")
    assert "--warmup-tokens must be 0 or more, got -1" in said("--warmup-tokens=-1")
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    monkeypatch.delitem(sys.modules, "layerscope_jax.serving.server")
    monkeypatch.delitem(sys.modules, "layerscope_jax.serving.app")
    assert "serving needs starlette" in said()
    assert "pip install 'layerscope-jax[serve]'" in said()


def test_an_address_in_use(engine, port):
    message = rf"cannot listen on 127\.0\.0\.1 port {port}: Address already in use; choose"
    with socket.create_server(("127.0.0.1", port)), pytest.raises(ValueError, match=message):
        Server(engine, ServerConfig(port=port))


def test_an_address_in_use_is_told_before_the_model_is_loaded(folder, port, capsys, monkeypatch):
    monkeypatch.setattr(serve.Serve, "open_model", lambda self: pytest.fail("the model was loaded"))
    with socket.create_server(("127.0.0.1", port)):
        assert cli.main(["serve", str(folder), f"--port={port}"]) == 2
    assert f"cannot listen on 127.0.0.1 port {port}" in capsys.readouterr().err
