"""The command `layerscope serve`."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Annotated

from layerscope_jax.cli.args import arg
from layerscope_jax.cli.engine_options import EngineOptions
from layerscope_jax.cli.options import PrefixCache
from layerscope_jax.engine import Engine
from layerscope_jax.serving.activity import Activity
from layerscope_jax.serving.settings import ServerConfig
from layerscope_jax.serving.warming import warm
from layerscope_jax.support import exits, interrupts
from layerscope_jax.support.exits import say

if TYPE_CHECKING:
    from layerscope_jax.serving.server import Server

API_KEY = "LAYERSCOPE_API_KEY"
"""Environment variable of the key, which a command line would show to every user of the machine."""

NEEDED = ("starlette", "uvicorn", "h11", "prometheus_client")

LOCAL = ("127.0.0.1", "::1", "localhost")

TICK_S = 0.2
"""Seconds between two looks at whether Ctrl-C came."""

EVERY_S = 10.0
"""Seconds between two lines on what the server does."""


@dataclass(frozen=True, kw_only=True)
class Serve(EngineOptions):
    """Serve a model over HTTP as OpenAI's API does: completions, chats, streaming, several requests at once.

    SIGTERM ends it: running requests may end first, and new ones are refused.

    Examples:
        layerscope serve path/to/checkpoint --served-model-name small
        layerscope serve path/to/checkpoint --device-budget 2GiB --port 8080 --max-num-seqs 16
    """

    prefix_cache: PrefixCache = True
    host: Annotated[
        str,
        arg(metavar="HOST", help="Address to listen on. The default is reached from this machine alone."),
    ] = "127.0.0.1"
    port: Annotated[int, arg(help="Port to listen on; 0 for any that is free.")] = 8000
    api_key: Annotated[
        str | None,
        arg(
            metavar="KEY",
            help=f"What clients must send as 'Authorization: Bearer KEY'. Better given as {API_KEY} in the "
            "environment. By default there is none.",
        ),
    ] = None
    served_model_name: Annotated[
        str | None,
        arg(metavar="NAME", help="Name under which clients ask for the model; by default CHECKPOINT."),
    ] = None
    max_model_len: Annotated[
        int | None,
        arg(
            metavar="INT",
            help="Most tokens of a prompt and its answer together; by default the model's context. The "
            "caches of all slots become as long as the longest request.",
        ),
    ] = None
    max_waiting: Annotated[
        int, arg(help="Most requests that wait for a slot; further ones are answered with status 429.")
    ] = 256
    timeout: Annotated[
        float, arg(help="Seconds that a client may take to send a request, or to take what it is sent.")
    ] = 30.0
    warmup_tokens: Annotated[
        int,
        arg(
            metavar="INT",
            help="Compile what requests of up to so many tokens, prompt and answer together, need before the "
            "server answers; 0 for next to nothing. What others need is compiled when they come.",
        ),
    ] = 256
    drain: Annotated[float, arg(help="Seconds that running requests have to end after SIGTERM.")] = 30.0
    json: Annotated[
        bool, arg(help="Print one JSON document to standard output as soon as the server answers.")
    ] = False

    def run(self) -> int:
        """Returns the exit code."""
        if self.json:
            exits.need_output()
        make = server_class()
        if self.warmup_tokens < 0:
            raise ValueError(f"--warmup-tokens must be 0 or more, got {self.warmup_tokens}")
        config, template = replace(self.engine_config(), context=self.max_model_len), self.template()
        serving = ServerConfig(
            host=self.host,
            port=self.port,
            api_key=self.api_key or os.environ.get(API_KEY) or None,
            served_model_name=self.served_model_name or self.checkpoint,
            max_waiting=self.max_waiting,
            max_model_len=self.max_model_len,
            timeout_s=self.timeout,
            drain_s=self.drain,
        )
        if serving.api_key is None and serving.host not in LOCAL:
            say(f"warning: whoever reaches {serving.host} may use the model; --api-key asks for a key")
        check_address(serving)
        model = self.open_model()
        context = min(self.max_model_len or model.config.max_position_embeddings, self.warmup_tokens)
        config = replace(config, slot_tokens=context)
        with Engine(model, self.measured(config, model), generation_config=self.generation_config) as engine:
            engine.generate([[0]], max_new_tokens=2, stop_token_ids=[])  # compiles what every request needs
            if context > 1:
                say(f"compiling for requests of up to {context} tokens (--warmup-tokens)")
                warm(engine, context, interrupts.check)
            with make(engine, serving, template) as server:
                name = serving.served_model_name
                if self.json:
                    print(json.dumps({"url": f"{server.url}/v1", "model": name}), flush=True)
                say(f"{name} answers at {server.url}/v1; Ctrl-C ends it")
                if not told_to_end(server):
                    say("error: the server has failed; the lines above say why")
                    return exits.FAILED
                say("ending: running requests are completed, new ones refused")
                server.drain()
        return exits.DONE


def server_class() -> Callable[..., Server]:
    """Returns `Server`.

    Raises:
        ValueError: if a package that it needs is not installed.
    """
    try:
        from layerscope_jax.serving.server import Server
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in NEEDED:
            raise
        raise ValueError(
            f"serving needs {package}, which is not installed: pip install 'layerscope-jax[serve]'"
        ) from None
    return Server


def check_address(serving: ServerConfig) -> None:
    """Checks that the server's address is free before a model is loaded, which can take minutes.

    Raises:
        ValueError: if it cannot be listened on.
    """
    from layerscope_jax.serving.server import listening

    listening(serving.host, serving.port).close()


def told_to_end(server: Server) -> bool:
    """Waits for SIGTERM and returns True, or False if the server has failed; says meanwhile what it does.

    Raises:
        KeyboardInterrupt: after a Ctrl-C.
    """
    told: SimpleQueue[None] = SimpleQueue()  # the one queue that a signal handler may use
    before = signal.signal(signal.SIGTERM, lambda *_: told.put(None))
    activity = Activity(EVERY_S, time.monotonic())
    try:
        while server.is_alive:
            interrupts.check()
            if line := activity.line(time.monotonic(), server.work()):
                say(line)
            with suppress(Empty):
                told.get(timeout=TICK_S)
                return True
        return False
    finally:
        signal.signal(signal.SIGTERM, before)  # a second one ends the process at once
