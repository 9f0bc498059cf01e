"""What a balancer asks a server, and the balancer of docs/balancing.md before two servers."""

import shutil
import socket
import subprocess
import threading
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
from serving_calls import JSON, MODEL, get, metric, post, until

from layerscope_jax.serving.server import Server
from layerscope_jax.serving.settings import ServerConfig

pytestmark = pytest.mark.usefixtures("quick_compiles")

CONFIG = Path(__file__).parents[2] / "examples" / "balancer" / "haproxy.cfg"
SHORT = {"model": MODEL, "prompt": "Call me", "max_tokens": 2, "temperature": 0}


def test_health_says_how_busy_a_server_is(server, engine):
    post(server, SHORT)
    until(lambda: get(server, "/health")[2]["requests_running"] == 0)
    told = get(server, "/health", headers={})[2]
    experts = sum(map(len, engine.model.bank.layers))
    assert (told["status"], told["requests_waiting"], told["experts"]) == ("ok", 0, experts)
    assert told["requests_free"] == 2 + 6  # slots and places in the queue
    assert 0 < told["experts_resident"] == engine.runner.resident_experts <= experts // 2
    assert told["hit_rate"] == pytest.approx(metric(server, "layerscope:hit_rate"))


def test_the_configuration_asks_for_health_and_sends_sessions_home():
    """What can be seen of it where no balancer is installed."""
    lines = [line.split("  #")[0].strip() for line in CONFIG.read_text().splitlines()]
    for line in (
        "option httpchk GET /health",
        "bind 127.0.0.1:8000",
        "balance hdr(X-Session-ID)",
        "balance leastconn",
    ):
        assert line in lines
    servers = [line for line in lines if line.startswith("server ")]
    assert servers == ["server first 127.0.0.1:8001", "server second 127.0.0.1:8002"] * 2


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@pytest.fixture
def balanced(engine, tmp_path):
    """A balancer and its two servers, which share an engine here."""
    if shutil.which("haproxy") is None:
        pytest.skip("needs haproxy")
    with ExitStack() as stack:
        servers = [
            stack.enter_context(Server(engine, ServerConfig(port=0, served_model_name=MODEL)))
            for _ in range(2)
        ]
        text, port = CONFIG.read_text(), free_port()
        own = [server.url.rpartition(":")[2] for server in servers]
        for theirs, ours in zip(("8000", "8001", "8002"), (port, *own), strict=True):
            assert f"127.0.0.1:{theirs}" in text
            text = text.replace(f"127.0.0.1:{theirs}", f"127.0.0.1:{ours}")
        file = tmp_path / "haproxy.cfg"
        file.write_text(text)
        process = subprocess.Popen(["haproxy", "-db", "-f", file], stderr=subprocess.DEVNULL)
        stack.callback(process.wait, 30)
        stack.callback(process.terminate)
        balancer = SimpleNamespace(url=f"http://127.0.0.1:{port}")
        until(lambda: answers(balancer))
        yield balancer, servers


def answers(server):
    try:
        return get(server, "/health")[0] == 200
    except OSError:
        return False


def served(servers):
    """Requests that each server has ended."""
    return [metric(server, "vllm:request_success_total", finished_reason="length") for server in servers]


def test_sessions_stay_and_a_server_that_ends_gets_nothing_new(balanced):
    balancer, servers = balanced
    for _ in range(4):
        assert post(balancer, SHORT)[0] == 200
    assert min(served(servers)) > 0
    home = {}
    for session in "abcdefgh":
        for _ in range(3):
            before = served(servers)
            assert post(balancer, SHORT, headers=JSON | {"X-Session-ID": session})[0] == 200
            until(lambda before=before: sum(served(servers)) == sum(before) + 1)
            moved = [now > then for now, then in zip(served(servers), before, strict=True)].index(True)
            assert home.setdefault(session, moved) == moved
    assert set(home.values()) == {0, 1}
    ending = threading.Thread(target=servers[0].drain)  # as after SIGTERM, but it goes on to tell its figures
    ending.start()
    until(lambda: get(servers[0], "/health")[0] == 503)
    while ending.is_alive():  # whether or not the balancer has noticed
        for session in home:
            assert post(balancer, SHORT, headers=JSON | {"X-Session-ID": session})[0] == 200
    assert post(servers[0], SHORT)[0] == 503
    before = served(servers)
    for session in home:
        assert post(balancer, SHORT, headers=JSON | {"X-Session-ID": session})[0] == 200
    assert served(servers)[0] == before[0]
    assert served(servers)[1] == before[1] + len(home)
