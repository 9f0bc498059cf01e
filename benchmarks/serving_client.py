"""Clients of a server, in a process of their own: all send at once, and note when each event comes.

Reads lines of JSON `{"host", "port", "bodies"}` from standard input, and answers each with a line
`{"seconds", "tokens", "times"}`: the token ids of each answer, and when (s) its events came since all were
sent. Lines with `"clients"` and `"seconds"` have so many clients send one of the bodies after another for so
long, and are answered with `{"ended": [[number of the body, token ids, times since it was sent], ...],
"lost"}`.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

HEAD = (
    "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    "Connection: close\r\nContent-Length: {length}\r\n\r\n"
)


async def stream(host: str, port: int, body: dict[str, Any], began: float) -> tuple[list[int], list[float]]:
    """Returns the token ids of a request's answer, and when its parts came."""
    reader, writer = await asyncio.open_connection(host, port)
    data = json.dumps(body | {"stream": True, "return_token_ids": True}).encode()
    writer.write(HEAD.format(length=len(data)).encode() + data)
    tokens: list[int] = []
    times, is_whole = [], False
    async for line in reader:
        if line.startswith(b"HTTP/1.1 ") and b" 200 " not in line:
            raise SystemExit(f"the server answered {line.decode().strip()}")
        if line.startswith(b"data: {"):
            times.append(time.perf_counter() - began)
            tokens += json.loads(line[6:])["choices"][0]["token_ids"]
        is_whole = is_whole or line.startswith(b"data: [DONE]")
    writer.close()
    if not is_whole:
        raise SystemExit("a stream broke off")
    return tokens, times


async def run(host: str, port: int, bodies: list[dict[str, Any]]) -> dict[str, Any]:
    """Sends all requests at once, and waits for all answers."""
    began = time.perf_counter()
    answers = await asyncio.gather(*[stream(host, port, body, began) for body in bodies])
    return {
        "seconds": time.perf_counter() - began,
        "tokens": [tokens for tokens, _ in answers],
        "times": [times for _, times in answers],
    }


async def load(
    host: str, port: int, bodies: list[dict[str, Any]], clients: int, seconds: float
) -> dict[str, Any]:
    """Has clients send one request after another until the time is over, and waits for the last answers."""
    end, ended, lost = time.perf_counter() + seconds, [], 0

    async def client(number: int) -> None:
        nonlocal lost
        while time.perf_counter() < end:
            number = (number + 1) % len(bodies)
            try:
                ended.append([number, *await stream(host, port, bodies[number], time.perf_counter())])
            except (SystemExit, OSError) as error:
                print(f"lost: {error!r}", file=sys.stderr)
                lost += 1

    await asyncio.gather(*[client(7 * number) for number in range(clients)])
    return {"ended": ended, "lost": lost}


def main() -> None:
    for line in sys.stdin:
        given = json.loads(line)
        print(json.dumps(asyncio.run((load if "seconds" in given else run)(**given))), flush=True)


if __name__ == "__main__":
    main()
