"""A server under load: clients that each send one request after another for a while."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from layerscope_jax import Engine, Request

SHARED_TOKENS = 24
"""Tokens that all prompts begin with, as with a system's message."""


def requests_of(prompts: Sequence[Sequence[int]], count: int, new_tokens: int) -> list[dict[str, Any]]:
    """Returns different requests: settings of `Request`, half of them greedy, of different lengths."""
    shared = list(prompts[0][:SHARED_TOKENS])
    return [
        {
            "prompt": [*shared, *prompts[number % len(prompts)][: 1 + number % 8]],
            "max_new_tokens": new_tokens // 2 + number % new_tokens,
            "temperature": float(number % 2),
            "seed": number,
            "stop_token_ids": [],
        }
        for number in range(count)
    ]


def warm(engine: Engine, requests: Sequence[dict[str, Any]], longest: int) -> None:
    """Compiles what the requests need: groups of any size that share a prefix, and whole prompts.

    The first requests to an idle server may all be greedy, and a batch that samples is another program.
    """
    prompt = max([len(request["prompt"]) for request in requests])
    for power in range(engine.config.max_num_seqs.bit_length()):
        count = min(2**power, engine.config.max_num_seqs)
        for tokens in (min(8, prompt), prompt):
            for temperature in (0.0, 1.0):
                engine.warmup(
                    prompt_tokens=tokens,
                    max_num_seqs=count,
                    new_tokens=longest - tokens,
                    temperature=temperature,
                )


def body_of(request: dict[str, Any]) -> dict[str, Any]:
    """Returns the body of a request."""
    body = dict(request)
    return body | {"max_tokens": body.pop("max_new_tokens")}


def resident_bytes() -> int:
    """Returns the memory (bytes) of this process that is in RAM; 0 where the system does not tell."""
    file = Path("/proc/self/statm")
    return int(file.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if file.exists() else 0


class Watched:
    """Notes the memory of this process within the block, a few times a second."""

    def __enter__(self) -> Watched:
        self.bytes: list[int] = []
        self.times: list[float] = []
        self._note()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._note()

    def _watch(self) -> None:
        while not self._over.wait(0.25):
            self._note()

    def _note(self) -> None:
        self.bytes.append(resident_bytes())
        self.times.append(time.perf_counter())

    def at(self, share: float) -> int:
        """Returns the memory after a share of the time."""
        return self.bytes[round(share * (len(self.bytes) - 1))]

    def growth(self) -> float:
        """Returns the bytes by which the memory grows in a minute, from a line through the second half."""
        half = (len(self.bytes) - 1) // 2
        seconds = np.array(self.times[half:]) - self.times[half]
        return 60 * float(np.polyfit(seconds, np.array(self.bytes[half:], float), 1)[0])


def alone(engine: Engine, requests: Sequence[dict[str, Any]]) -> list[list[int]]:
    """Returns the token ids of each request's answer when it runs by itself."""
    return [engine.generate([Request(**request)]).token_ids[0] for request in requests]


def load(
    run: Callable[[list[dict[str, Any]], int, float], dict[str, Any]],
    expected: Sequence[Sequence[int]],
    requests: Sequence[dict[str, Any]],
    clients: int,
    seconds: float,
) -> dict[str, Any]:
    """Has clients send requests for a while, and returns what came of it.

    Args:
        run: `(bodies, clients, seconds)` -> what `benchmarks.serving_client` answers.
        expected: the token ids of each request's answer when it runs by itself.
        requests: sent in turns.
        clients: how many send at once.
        seconds: for how long.
    """
    bodies = [body_of(request) for request in requests]
    began = time.perf_counter()
    with Watched() as memory:
        answer = run(bodies, clients, seconds)
    took = time.perf_counter() - began
    ended = answer["ended"]  # [request, token ids, times of their parts since it was sent]
    gaps = np.array([after - before for _, _, times in ended for before, after in pairwise(times)] or [0.0])
    first = np.array([times[0] for _, _, times in ended if times] or [0.0])
    same = [tokens == expected[number] for number, tokens, _ in ended]
    return {
        "clients": clients,
        "seconds": round(took, 3),
        "requests": len(ended),
        "lost": answer["lost"],
        "same_tokens": float(np.mean(same)) if same else 0.0,
        "tokens_per_s": sum(len(tokens) for _, tokens, _ in ended) / took,
        "gap_ms": quantiles_ms(gaps),
        "first_ms": quantiles_ms(first),
        "memory_mib": {
            name: round(memory.at(share) / 2**20, 1)
            for name, share in (("start", 0.0), ("quarter", 0.25), ("middle", 0.5), ("end", 1.0))
        },
        "growth_mib_per_minute": round(memory.growth() / 2**20, 2),
    }


def quantiles_ms(seconds: np.ndarray) -> dict[str, float]:
    """Returns the median, the 99th percentile and the most of times, in milliseconds."""
    shares = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {name: round(1e3 * float(np.quantile(seconds, share)), 3) for name, share in shares.items()}
