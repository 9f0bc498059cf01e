"""Connections that are only held open cost nobody an answer, however many there are."""

import http.client
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
from serving_calls import get, post, sent, until

from layerscope_jax.serving import connections
from layerscope_jax.serving.server import Server
from layerscope_jax.serving.settings import ServerConfig

pytestmark = pytest.mark.usefixtures("quick_compiles")

BODY = {"prompt": "Call me", "max_tokens": 6, "temperature": 0, "ignore_eos": True}


def kept(server):
    """A connection whose first request was answered, and the way to send another over it."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=30)

    def status():
        connection.request("GET", "/health")
        with connection.getresponse() as answer:
            answer.read()
            return answer.status

    assert status() == 200
    return connection, status


def is_closed(connection):
    """Whether the server has closed a connection."""
    try:
        return connection.recv(1) == b""
    except ConnectionError:  # with something unread
        return True


def test_hundreds_of_idle_sockets(engine):
    """The oldest make room; who sends requests is answered, over an old connection and over new ones."""
    most = 12
    config = ServerConfig(port=0, max_connections=most)
    with Server(engine, config) as server, ExitStack() as stack, ThreadPoolExecutor(1) as threads:
        open_ones = server._http.server_state.connections
        alone = post(server, BODY)[2]["choices"][0]["text"]
        connection, status = kept(server)
        stack.callback(connection.close)
        with engine._turns.turn():  # no step runs meanwhile
            running = threads.submit(post, server, BODY)
            until(lambda: len(server._service._jobs) == 1)
            held = []
            for number in range(300):
                held.append(stack.enter_context(sent(server, b"POST /v1/comp" if number % 2 else b"")))
                if number % 100 == 99:
                    until(lambda: len(open_ones) <= most)
                    assert status() == 200
                    assert get(server, "/health")[0] == 200
        assert running.result()[2]["choices"][0]["text"] == alone
        assert post(server, BODY)[0] == 200
        assert [is_closed(socket) for socket in held[: 300 - most]] == [True] * (300 - most)


def test_where_all_are_being_answered(engine):
    """A new connection is told so at once; the next one after that is not."""
    most = 3
    with (
        Server(engine, ServerConfig(port=0, max_connections=most)) as server,
        ThreadPoolExecutor(most) as threads,
    ):
        with engine._turns.turn():
            running = [threads.submit(post, server, BODY) for _ in range(most)]
            until(lambda: len(server._service._jobs) == most)
            status, headers, refusal = get(server, "/health")
        assert (status, headers["retry-after"]) == (503, "1")
        assert refusal["error"]["message"].startswith("requests of all connections are being answered;")
        assert [answer.result()[0] for answer in running] == [200] * most
        assert get(server, "/health")[0] == 200


def test_the_files_of_a_process_bound_them(monkeypatch):
    unbounded = -1
    for files, most in ((1024, 512), (1, 1), (10**6, connections.MOST), (unbounded, connections.MOST)):
        system = SimpleNamespace(
            getrlimit=lambda _, files=files: (files, 10**6), RLIMIT_NOFILE=7, RLIM_INFINITY=unbounded
        )
        monkeypatch.setitem(sys.modules, "resource", system)
        assert connections.connection_class(1.0, None).most == most
    monkeypatch.setitem(sys.modules, "resource", None)
    assert connections.connection_class(1.0, None).most == connections.MOST
    with pytest.raises(ValueError, match="max_connections must be a whole number, 1 or more, or None, got 0"):
        ServerConfig(max_connections=0)
