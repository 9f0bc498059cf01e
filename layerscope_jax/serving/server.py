"""The server: an engine behind HTTP, with the event loop and the engine's steps in threads of their own."""

from __future__ import annotations

import logging
import socket
import threading
import time

import uvicorn

from layerscope_jax.engine import Engine
from layerscope_jax.generation.chat import Chat
from layerscope_jax.serving.activity import Work
from layerscope_jax.serving.app import make_app
from layerscope_jax.serving.connections import connection_class
from layerscope_jax.serving.service import Service
from layerscope_jax.serving.settings import ServerConfig

logger = logging.getLogger(__name__)

PATIENCE_S = 60.0
"""Seconds to wait for a step that is running when the server ends."""

IDLE_S = 30
"""Seconds that a connection may be idle between two requests."""

LAST_WORDS_S = 2
"""Seconds that aborted answers have to be sent."""

QUEUED = 128
"""Most connections that the system holds until they are taken, which then happens at once: they need files
beyond `max_connections` for a moment."""

ASKED_S, NOTICE_S = 10.0, 2.0
"""A server whose health was asked for within the first of these (seconds) says for the second that it ends,
and takes requests meanwhile: balancers ask every second or two."""


class Server:
    """Serves an engine as OpenAI's API; a context manager, within whose block it answers.

    It has the engine to itself as long as it runs. Leaving the block aborts what is running; call `drain`
    before to let it end.

    Args:
        engine: generates; the caller closes it, after the server.
        config: address and limits.
        chat_template: Jinja text that turns the messages of a chat into a prompt; None for the checkpoint's
            own.

    Attributes:
        url: where it answers.

    Raises:
        ValueError: if the address cannot be listened on.

    Example::

        with Server(engine, ServerConfig(port=0)) as server:
            print(server.url)
            ...
            server.drain()
    """

    def __init__(self, engine: Engine, config: ServerConfig | None = None, chat_template: str | None = None):
        self.config = config or ServerConfig()
        self._socket = listening(self.config.host, self.config.port)
        host, port = self._socket.getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self._chat = Chat(engine.model.path, chat_template)
        self._service = Service(engine, self._chat, self.config)
        context = engine.model.config.max_position_embeddings
        app = make_app(self._service, self.config, min(self.config.max_model_len or context, context))
        self._http = _Http(
            uvicorn.Config(
                app,
                http=connection_class(self.config.timeout_s, self.config.max_connections),
                backlog=QUEUED,
                loop="asyncio",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=IDLE_S,
                timeout_graceful_shutdown=LAST_WORDS_S,
            )
        )
        self._thread = threading.Thread(target=self._serve, name="layerscope-http", daemon=True)

    def __enter__(self) -> Server:
        self._thread.start()
        self._http.answering.wait()
        if not self._http.started:
            self.close()
            raise RuntimeError("the HTTP server did not start; its log says why")
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_alive(self) -> bool:
        """Whether requests are answered."""
        return self._thread.is_alive() and self._service.is_healthy

    def work(self) -> Work:
        """Returns what the server is doing, and what it has done so far."""
        return self._service.work()

    def drain(self) -> None:
        """Refuses new requests, and waits for those that are being answered, at most `drain_s` seconds.

        Where somebody asks for its health, it first says for two seconds that it ends, and takes requests
        meanwhile: a balancer sends some until it has asked again.
        """
        began, service = time.monotonic(), self._service
        service.draining = True
        if began - service.asked_s < ASKED_S:
            time.sleep(min(NOTICE_S, self.config.drain_s))
        service.refusing = True
        end = began + self.config.drain_s
        while not self._service.is_idle and time.monotonic() < end and self._thread.is_alive():
            time.sleep(0.02)

    def close(self) -> None:
        """Aborts what is running, and ends the server's threads."""
        self._service.close(PATIENCE_S)
        self._http.should_exit = True
        if self._thread.is_alive():
            self._thread.join(PATIENCE_S)
        self._socket.close()
        self._chat.close()

    def _serve(self) -> None:
        try:
            self._http.run(sockets=[self._socket])
        except BaseException:
            logger.exception("the HTTP server has failed")
        finally:
            self._http.answering.set()


class _Http(uvicorn.Server):
    """uvicorn's server, which tells when it answers."""

    def __init__(self, config: uvicorn.Config):
        super().__init__(config)
        self.answering = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to answer."""
        await super().startup(sockets)
        self.answering.set()


def listening(host: str, port: int) -> socket.socket:
    """Returns a socket that is bound to an address.

    Raises:
        ValueError: if it cannot be bound.
    """
    try:
        [(family, *_, address), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return socket.create_server(address[:2], family=family, backlog=QUEUED)
    except OSError as error:
        why = (error.strerror or str(error)).partition(" (while")[0]  # Python repeats the address there
        raise ValueError(f"cannot listen on {host} port {port}: {why}; choose another host or port") from None
