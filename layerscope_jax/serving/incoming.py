"""Bodies of requests as they come in over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any

from layerscope_jax.serving.refusals import Refusal

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

MOST_DISCARDED = 64 * 2**20
"""Most bytes of a refused body that are read all the same."""


class Incoming:
    """The body of a request that comes in.

    Args:
        receive: ASGI's `receive`.
        timeout_s: time (s) within which all of it must have come.
    """

    def __init__(self, receive: Receive, timeout_s: float):
        self._receive, self._timeout_s = receive, timeout_s
        self._is_over = False

    async def read(self, most: int) -> bytes:
        """Returns the body.

        Raises:
            Refusal: if it has more than `most` bytes, or does not come in time.
        """
        body = bytearray()
        try:
            async with asyncio.timeout(self._timeout_s):
                while not self._is_over:
                    body += await self._part()
                    if len(body) > most:
                        raise too_large(most)
        except TimeoutError:
            self._is_over = True
            raise Refusal(
                408,
                f"the request did not arrive completely within {self._timeout_s:g} s",
                headers={"connection": "close"},
            ) from None
        return bytes(body)

    async def discard(self) -> None:
        """Reads what is left of the body: a client that still sends would not see the answer."""
        left = MOST_DISCARDED
        with suppress(TimeoutError):
            async with asyncio.timeout(self._timeout_s):
                while not self._is_over and left > 0:
                    left -= len(await self._part())

    async def until_gone(self) -> None:
        """Waits until the client has gone; the body must have been read."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def _part(self) -> bytes:
        message = await self._receive()
        self._is_over = not message.get("more_body", False)  # as after a disconnection
        return message.get("body", b"")


def check_head(headers: dict[bytes, bytes], most: int) -> None:
    """Refuses a request by its head.

    A body of another type than JSON is refused because a web page may make any browser send one to a server
    on the same machine; JSON it may not.

    Raises:
        Refusal: if the body is not JSON, or has more than `most` bytes.
    """
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if kind != b"application/json":
        raise Refusal(415, "the header Content-Type must be application/json")
    length = headers.get(b"content-length", b"0")
    if length.isdigit() and int(length) > most:
        raise too_large(most)


def too_large(most: int) -> Refusal:
    """Returns the refusal of a body of more than so many bytes."""
    return Refusal(413, f"the body must have at most {most:,} bytes")
