"""What does serving cost?

So many clients, in a process of their own, each stream a continuation of a real prompt over HTTP, all at the
same time. The same requests are also given to one call of `generate`, in the process of the server, with
nobody to stream to: what HTTP, JSON and the server's threads add is the difference.

With `--seconds` the clients send one request after another, with the prefix cache, and the questions are
whether any answer is lost, or has other tokens than that of the same request alone, how regularly tokens
come, and whether the memory stays what it is. `--policies lru --budget 50` has half of the experts moved.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from rich.console import Console

from benchmarks import harness, serving_load
from benchmarks.bench_batching import RESIDENT, Setting, config_of
from benchmarks.bench_policies import read_prompts
from benchmarks.random_models import random_model, shapes
from layerscope_jax import Engine, Model, Request, load
from layerscope_jax.serving.server import Server
from layerscope_jax.serving.settings import ServerConfig

GENERATE, SERVE = "generate", "serve"


@dataclass(frozen=True, kw_only=True)
class Options(Setting):
    """What to measure."""

    policies: tuple[str, ...] = (RESIDENT, "host-only")
    clients: tuple[int, ...] = (8, 32)
    prompt_tokens: int = 16
    """Prompts are cut to so many, so that groups of any of them are prefilled by the same programs."""
    new_tokens: int = 32
    shape: str | None = None
    """A random model of one of `random_models.shapes` in the checkpoint's place, with its vocabulary: of a
    larger one a step takes longer, and so HTTP a smaller share."""
    rounds: int = 5
    seconds: float | None = None
    """For how long the clients send one request after another; once each, in rounds, if left out."""
    slots: int = 32
    """Requests that run at once while they do; others wait."""
    warm_ups: int = 12
    """Most times that they do so for a while before, until nothing new is compiled."""


class Clients:
    """The process of the clients; a context manager."""

    def __enter__(self) -> Clients:
        command = [sys.executable, "-m", "benchmarks.serving_client"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def run(self, url: str, bodies: Sequence[dict[str, Any]], **load: float) -> dict[str, Any]:
        """Sends all requests at once, or (`clients`, `seconds`) for a while; returns what came, and when."""
        host, port = url.removeprefix("http://").split(":")
        line = json.dumps({"host": host, "port": int(port), "bodies": bodies, **load})
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit("error: the clients have failed; the lines above say why")
        return json.loads(answer)


@contextmanager
def opened(engine: Engine) -> Iterator[tuple[Server, Clients]]:
    """A server of an engine, and clients for it."""
    with Server(engine, ServerConfig(port=0)) as server, Clients() as clients:
        yield server, clients


def warm(engine: Engine, prompts: Sequence[Sequence[int]]) -> None:
    """Compiles what requests need that come in groups of any size, and while others run."""
    sizes = [2**power for power in range(len(prompts).bit_length())]
    for first in sizes:
        for second in sizes:
            if first + second > len(prompts):
                continue
            handles = [
                engine.submit(prompt, max_new_tokens=6, stop_token_ids=()) for prompt in prompts[:first]
            ]
            next(iter(handles[0]))
            more = [engine.submit(prompt, max_new_tokens=2, stop_token_ids=()) for prompt in prompts[:second]]
            for handle in handles + more:
                handle.result()


def race(engine: Engine, prompts: Sequence[Sequence[int]], new_tokens: int, rounds: int) -> dict[str, Any]:
    """One engine with a client for each prompt."""
    settings = {"temperature": 0.0, "stop_token_ids": []}
    requests = [Request(prompt=prompt, max_new_tokens=new_tokens, **settings) for prompt in prompts]
    bodies = [{"prompt": list(prompt), "max_tokens": new_tokens, **settings} for prompt in prompts]
    tokens: dict[str, list[list[list[int]]]] = {GENERATE: [], SERVE: []}
    runs: list[list[list[float]]] = []  # when the parts of each answer came
    warm(engine, prompts)
    with opened(engine) as (server, clients):

        def generate() -> None:
            tokens[GENERATE].append(engine.generate(requests).token_ids)

        def serve() -> dict[str, Any]:
            answer = clients.run(server.url, bodies)
            tokens[SERVE].append(answer["tokens"])
            runs.append(answer["times"])
            return {"seconds": answer["seconds"]}

        samples = harness.measure({GENERATE: generate, SERVE: serve}, rounds)
    timed = [times for run in runs[-rounds:] for times in run]
    gaps = np.concatenate([np.diff(times) for times in timed])
    if not len(gaps):
        gaps = np.zeros(1)  # every answer came in one part
    seconds = {name: found.parts["seconds"] for name, found in samples.items()}
    expected = tokens[GENERATE][-1]
    same = [own == other for run in tokens[SERVE] for own, other in zip(run, expected, strict=True)]
    return {
        "clients": len(prompts),
        "tokens_per_s": {
            name: harness.spread(len(prompts) * new_tokens / each for each in found)
            for name, found in seconds.items()
        },
        "throughput_to_generate": harness.ratio(seconds[GENERATE], seconds[SERVE]),
        "gap_ms": {
            name: round(1e3 * float(np.quantile(gaps, share)), 3)
            for name, share in (("p50", 0.5), ("p99", 0.99))
        },
        "first_s": harness.spread(times[0] for times in timed),
        "same_tokens": float(np.mean(same)),
        "compiled_while_timed": sum(found.compiled for found in samples.values()),
    }


def endure(model: Model, policy: str, prompts: Any, clients: int, options: Options) -> dict[str, Any]:
    """One engine under load for a while, after shorter whiles that are not counted: until one of them needs
    no new program, because which groups meet in a prefill is left to chance.

    What each request is to give is what it gives alone, without a prefix cache.
    """
    assert options.seconds is not None
    requests = serving_load.requests_of(prompts, max(2, clients), options.new_tokens)
    configs = [
        replace(config_of(policy, model, options, slots), numerics="exact") for slots in (1, options.slots)
    ]
    with Engine(model, configs[0]) as engine:
        expected = serving_load.alone(engine, requests)
    longest = max([len(request["prompt"]) + request["max_new_tokens"] for request in requests])
    config = replace(configs[1], prefix_cache=True, slot_tokens=longest)
    with Engine(model, config) as engine, opened(engine) as (server, sending):
        serving_load.warm(engine, requests, longest)

        def run(bodies: list[dict[str, Any]], clients: int, seconds: float) -> dict[str, Any]:
            return sending.run(server.url, bodies, clients=clients, seconds=seconds)

        warm_ups, before = 0, None
        while warm_ups < options.warm_ups and before != harness.compiled_programs():
            before = harness.compiled_programs()
            serving_load.load(run, expected, requests, clients, min(10.0, options.seconds))
            warm_ups += 1
        before = harness.compiled_programs()
        row = serving_load.load(run, expected, requests, clients, options.seconds)
        row["compiled_while_timed"] = harness.compiled_programs() - before
    return row | {"policy": policy, "slots": options.slots, "warm_ups": warm_ups}


def load_table(rows: Sequence[dict[str, Any]]) -> None:
    lines = [
        (
            row["policy"],
            row["clients"],
            f"{row['seconds']:.0f}",
            row["requests"],
            row["lost"],
            f"{row['same_tokens']:.1%}",
            f"{row['tokens_per_s']:.0f}",
            *(f"{row['gap_ms'][name]:.1f}" for name in ("p50", "p99")),
            f"{row['first_ms']['p50']:.0f}",
            *(f"{row['memory_mib'][name]:.0f}" for name in ("start", "middle", "end")),
            f"{row['growth_mib_per_minute']:.1f}",
            row["compiled_while_timed"],
        )
        for row in rows
    ]
    headings = ("policy", "clients", "s", "answers", "lost", "same tokens", "tokens/s", "gap, ms")
    more = ("gap p99, ms", "first, ms", "MiB, start", "middle", "end", "a minute", "compiled")
    harness.print_table("Under load; times as the clients see them", (*headings, *more), lines)


def table(rows: Sequence[dict[str, Any]]) -> None:
    lines = [
        (
            row["policy"],
            row["clients"],
            *(f"{row['tokens_per_s'][name]['median']:.0f}" for name in (SERVE, GENERATE)),
            f"{row['throughput_to_generate']['median']:.2f}",
            f"{1e3 * row['first_s']['median']:.0f}",
            f"{row['gap_ms']['p50']:.1f}",
            f"{row['gap_ms']['p99']:.1f}",
            f"{row['same_tokens']:.0%}",
        )
        for row in rows
    ]
    headings = ("policy", "clients", "serve, tokens/s", "generate, tokens/s", "to generate")
    more = ("first, ms", "gap, ms", "gap p99, ms", "same tokens")
    harness.print_table("Throughput, medians; times as the clients see them", (*headings, *more), lines)


def model_of(options: Options) -> Model:
    """The checkpoint's model, or a random one with its tokenizer.

    Raises:
        ValueError: if there is no such checkpoint or shape.
    """
    model = load(options.checkpoint)
    if options.shape is None:
        return model
    known = shapes(options.quick)
    if options.shape not in known:
        raise ValueError(f"shapes are {', '.join(known)}; got {options.shape}")
    config = replace(known[options.shape], vocab_size=model.config.vocab_size)
    return replace(random_model(config), tokenizer=model.tokenizer)


def main(options: Options) -> dict[str, Any]:
    if options.quick:
        seconds = None if options.seconds is None else 1.0
        changes: Any = {"clients": (3,), "new_tokens": 4, "rounds": 1, "seconds": seconds, "slots": 2}
        changes["warm_ups"] = 1
        options = Options(**(vars(options) | changes))
    with contextlib.suppress(RuntimeError):  # JAX is in use already: with as many as it has
        jax.config.update("jax_num_cpu_devices", 2)  # without an accelerator, the second is its host
    try:
        model = model_of(options)
        file = options.prompts or options.checkpoint / "prompts.jsonl"
        known = read_prompts(file, model, options.new_tokens)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    record, progress, rows = harness.machine(), Console(stderr=True), []
    for policy in options.policies:
        for clients in options.clients:
            prompts = [known[index % len(known)][: options.prompt_tokens] for index in range(clients)]
            if options.seconds is None:
                with Engine(model, config_of(policy, model, options, clients)) as engine:
                    row = race(engine, prompts, options.new_tokens, options.rounds)
            else:
                row = endure(model, policy, known, clients, options)
            rows.append({"policy": policy} | row)
            progress.print(f"measured {policy} with {clients} clients")
    (table if options.seconds is None else load_table)(rows)
    return harness.finish(
        options,
        {
            "benchmark": "serving",
            "quick": options.quick,
            "machine": record,
            "shape": options.shape,
            "budget_percent": options.budget,
            "link": options.link,
            "prompt_tokens": options.prompt_tokens,
            "new_tokens": options.new_tokens,
            "rounds": options.rounds,
            "load_s": options.seconds,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
