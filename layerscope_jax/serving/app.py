"""The application: which path answers what, in OpenAI's form."""

from __future__ import annotations

import hmac
import json
import time
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from layerscope_jax.generation.openai_requests import LENGTHS
from layerscope_jax.serving.bodies import unknown_model
from layerscope_jax.serving.incoming import Incoming
from layerscope_jax.serving.refusals import Refusal
from layerscope_jax.serving.service import Service
from layerscope_jax.serving.settings import ServerConfig

API = "/v1"
"""Paths below it need the key; `/health` and `/metrics` are for those who run the server."""

PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


class Completions:
    """The endpoint of chats or of texts.

    Args:
        service: answers.
        url: path of the endpoint.
        timeout_s: time (s) within which all of a body must have come.
    """

    def __init__(self, service: Service, url: str, timeout_s: float):
        self._service, self._url, self._timeout_s = service, url, timeout_s

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        incoming = Incoming(receive, self._timeout_s)
        try:
            await self._service.complete(self._url, dict(scope["headers"]), incoming, send)
        except Refusal:
            await incoming.discard()
            raise


class NeedsKey:
    """Refuses requests of the API without the key.

    Args:
        app: gets the other requests.
        key: what clients must send.
        timeout_s: time (s) within which all of a body must have come.
    """

    def __init__(self, app: Any, key: str, timeout_s: float):
        self._app, self._expected, self._timeout_s = app, f"Bearer {key}".encode(), timeout_s

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"].startswith(API):
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                refusal = Refusal(
                    401,
                    "expected the header 'Authorization: Bearer KEY' with the server's key",
                    code="invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )
                await Incoming(receive, self._timeout_s).discard()
                await response_to(refusal)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def make_app(service: Service, config: ServerConfig, context: int) -> Starlette:
    """Returns the application.

    Args:
        service: answers chats and texts.
        config: name of the model, key and limits.
        context: most tokens of a prompt and its answer.
    """
    name, timeout_s = config.served_model_name, config.timeout_s
    created = int(time.time())

    def described() -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "layerscope",
            "max_model_len": context,
        }

    async def models(request: Request) -> Response:
        return json_of({"object": "list", "data": [described()]})

    async def model(request: Request) -> Response:
        named = request.path_params["name"]
        if named != name:
            raise unknown_model(named, name)
        return json_of(described())

    async def health(request: Request) -> Response:
        healthy, service.asked_s = service.is_healthy, time.monotonic()
        state = {"status": "ok" if healthy else "ending"} | service.load()
        return json_of(state, 200 if healthy else 503)

    async def metrics(request: Request) -> Response:
        return Response(service.metrics.text(), media_type=PROMETHEUS)

    return Starlette(
        routes=[
            *[Route(url, Completions(service, url, timeout_s), methods=["POST"]) for url in LENGTHS],
            Route(f"{API}/models", models),
            Route(f"{API}/models/{{name:path}}", model),
            Route("/health", health),
            Route("/metrics", metrics),
        ],
        middleware=[Middleware(NeedsKey, key=config.api_key, timeout_s=timeout_s)] if config.api_key else [],
        exception_handlers={Refusal: refused, HTTPException: misdirected, Exception: faulty},
    )


def json_of(content: Any, status: int = 200) -> Response:
    """Returns a response in JSON."""
    return Response(json.dumps(content), status, media_type="application/json")


def response_to(refusal: Refusal) -> Response:
    """Returns the response that says why a request is refused."""
    return Response(refusal.body(), refusal.status, refusal.headers, media_type="application/json")


async def refused(request: Request, error: Any) -> Response:
    """Answers a request that is refused."""
    return response_to(error)


async def misdirected(request: Request, error: Any) -> Response:
    """Answers a request for a path, or by a method, that there is not."""
    message = f"{request.method} {request.url.path[:100]}: {error.detail}"
    return response_to(Refusal(error.status_code, message, headers=error.headers))


async def faulty(request: Request, error: Exception) -> Response:
    """Answers a request that a bug keeps from being answered; the server logs the traceback."""
    return response_to(
        Refusal(500, f"this is a bug in the server, not in the request: {type(error).__name__}")
    )
