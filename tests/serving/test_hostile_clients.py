"""Whatever others do to a server meanwhile, a client gets the answer that it gets alone."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from serving_calls import get, post, request, rest, sent, until

from layerscope_jax.serving.server import Server
from layerscope_jax.serving.settings import ServerConfig

pytestmark = pytest.mark.usefixtures("quick_compiles")

SLOTS, QUEUE, FLOOD = 2, 6, 20
LONG = {"temperature": 0, "max_tokens": 80, "ignore_eos": True}
VICTIM = LONG | {"prompt": "victim"}
LEAVER = LONG | {"prompt": "leaver.", "stream": True}
SLOW = LONG | {"prompt": ["slow reader", "slow reader"], "logprobs": 20, "stream": True}
SHORT = {"prompt": "x", "temperature": 0, "max_tokens": 2}


def job_of(server, body):
    """The job of a body, once the engine has its requests; told by its number of tokens, a byte each."""
    found = []

    def is_there():
        jobs = [job for job in list(server._service._jobs) if job.handles]
        found[:] = [job for job in jobs if job.asked.prompt_tokens == len("".join(body["prompt"]))]
        return found

    until(is_there)
    return found[0]


def made(job):
    """The tokens so far of a job's first prompt."""
    return job.handles[0].since(0)[0]


class Scene:
    """Who is there, and the engine's step, which waits where a test has to be sure of the order.

    Attributes:
        victim, leaver: jobs.
        abused: set when all abuse that needs no step has happened.
        late: steps in which a client had a slot after the server had noticed that it was gone.
    """

    def __init__(self, step):
        self._step, self.victim, self.leaver = step, None, None
        self.abused, self.late = threading.Event(), 0

    def step(self, *arguments):
        time.sleep(0.003)
        leaver, victim = self.leaver, self.victim
        if leaver is not None and not leaver.handles[0].done:
            self.late += leaver.left
            if len(made(leaver)) > 20:
                until(lambda: leaver.left)
        if victim is not None and len(made(victim)) > 60:
            assert self.abused.wait(30)
        return self._step(*arguments)


def abuse(server, scene, threads, statuses):
    """Everything at once, while the victim's stream is open; returns the slow reader's connection."""
    until(lambda: made(scene.victim))
    leaving = sent(server, request(LEAVER))
    assert leaving.recv(12) == b"HTTP/1.1 200"
    scene.leaver = job_of(server, LEAVER)  # both slots are taken, and a step frees one only when it has left
    large = threads.submit(post, server, b" " * 10_000_000)
    half = threads.submit(rest, sent(server, request(SHORT, length=1000)))
    slow = sent(server, request(SLOW), room=4096)
    job_of(server, SLOW)
    assert post(server, b'{"prompt": ')[0] == 400
    flood = [threads.submit(lambda: statuses.append(post(server, SHORT)[0])) for _ in range(FLOOD)]
    until(lambda: statuses.count(429) >= FLOOD - QUEUE)
    assert get(server, "/health")[0] == 200
    leaving.close()
    assert large.result()[0] == 413
    assert half.result().startswith(b"HTTP/1.1 408 ")
    return slow, flood


def test_everything_at_once(engine, monkeypatch):
    threads_before, scene = set(threading.enumerate()), Scene(engine.runner.step)
    config = ServerConfig(port=0, max_waiting=QUEUE, timeout_s=0.4)
    with Server(engine, config) as server, ThreadPoolExecutor(FLOOD + 4) as threads:
        alone = post(server, VICTIM)[2]["choices"][0]
        assert (
            alone["text"] == engine.generate([VICTIM["prompt"]], max_new_tokens=80, ignore_eos=True).texts[0]
        )
        server._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # connections take it over
        monkeypatch.setattr(engine.runner, "step", scene.step)
        victim = threads.submit(post, server, VICTIM | {"stream": True})
        scene.victim, statuses = job_of(server, VICTIM), []
        slow, flood = abuse(server, scene, threads, statuses)
        assert not victim.done()
        scene.abused.set()
        events = victim.result()[2].split("\n\n")
        chunks = [json.loads(event[6:])["choices"][0] for event in events if event.startswith("data: {")]
        assert "data: [DONE]" in events
        assert "".join(chunk["text"] for chunk in chunks) == alone["text"]
        assert chunks[-1]["finish_reason"] == alone["finish_reason"] == "length"
        for each in flood:
            each.result()
        assert set(statuses) == {200, 429}
        assert scene.late <= 2
        assert made(scene.leaver)[-1].finish_reason == "abort"
        until(lambda: server._service.is_idle and not server._service._jobs)
        assert b"[DONE]" not in rest(slow)
        until(lambda: not server._http.server_state.connections and not server._http.server_state.tasks)
        assert get(server, "/health")[2]["requests_free"] == SLOTS + QUEUE
    until(lambda: set(threading.enumerate()) <= threads_before)
