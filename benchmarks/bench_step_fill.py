"""Which way of filling slots works inside a step on this machine, and at how many bytes a second?

Experts of a real size lie in pinned host memory, one array after the other; a pool on the device has slots
for some. One jitted program is told which experts to copy into which slots, by arrays that are on the device.
Each way is asked whether it runs, whether the bytes are right, whether the pool stays in its place, and how
fast it is for one expert and for several. Beside them: what `jax.device_put` of the same arrays takes, begun
from Python, which has to be told which experts.

Ways: `warp`, this package's kernel for GPUs, which reads host memory by its address; `loops`, that for CPUs;
`xla`, a slice of a stack in pinned memory, moved to the device by XLA, which on GPUs may compute it on the
host. A callback to Python (`jax.experimental.buffer_callback`) is not among them: it would have to read from
the device which experts are missing, and that wait is what a step is to be rid of.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks import harness
from benchmarks.memory_facts import on_device, waited
from layerscope_jax.formats import BFLOAT16
from layerscope_jax.offload.bank import device_sharding, host_sharding
from layerscope_jax.offload.fills import addresses_of, by_loops, by_warp
from layerscope_jax.offload.slots import Moves


@dataclass(frozen=True, kw_only=True)
class Options(harness.Common):
    """What to measure."""

    width: int = 2048
    """D of an expert in bfloat16."""
    hidden: int = 768
    """F of it: with D = 2048 an expert of Qwen3-30B-A3B, of 9.4 MB."""
    experts: int = 64
    """In host memory."""
    slots: int = 24
    moved: tuple[int, ...] = (1, 2, 8)
    """Experts that a program copies."""
    rounds: int = 15


def stacked(experts: list[Any]) -> Any:
    """The experts as stacks in pinned memory, which `xla` takes slices of."""
    arrays = (np.stack([np.asarray(array) for array in some]) for some in zip(*experts, strict=True))
    return BFLOAT16.Expert(*(jax.device_put(array, host_sharding()) for array in arrays))


def by_xla(pool: Any, moves: Moves, bank: Any) -> Any:
    def move(number: int, pool: Any) -> Any:
        source, target = moves.sources[number], moves.targets[number]

        def copied(pool: Any) -> Any:
            def array(into: jax.Array, given: jax.Array) -> jax.Array:
                one = jax.lax.dynamic_index_in_dim(given, source)
                one = jax.device_put(one, jax.memory.Space.Device)
                return jax.lax.dynamic_update_slice_in_dim(into, one, target, 0)

            return jax.tree.map(array, pool, bank)

        return jax.lax.cond(source >= 0, copied, lambda pool: pool, pool)

    return jax.lax.fori_loop(0, len(moves.sources), move, pool)


def ways(experts: list[Any]) -> dict[str, Callable[[], tuple[Callable, Any]]]:
    """Name -> makes the function and its operand; fails where a way is not possible."""
    tables = partial(on_device, addresses_of(experts))
    found: dict[str, Callable[[], tuple[Callable, Any]]] = {"warp": lambda: (by_warp(), tables())}
    if jax.devices()[0].platform == "cpu":
        found["loops"] = lambda: (by_loops(), tables())
    found["xla"] = lambda: (by_xla, stacked(experts))  # last: it may end the process
    return found


def moves_of(count: int, options: Options) -> Moves:
    sources = (np.arange(count, dtype=np.int32) * 7 + 3) % options.experts
    targets = np.arange(count, dtype=np.int32)[::-1].copy()
    return Moves(on_device(sources), on_device(targets))


def tried(way: Callable[[], tuple[Callable, Any]], experts: list[Any], options: Options) -> dict[str, Any]:
    """What is true of one way."""
    buffers = BFLOAT16.buffers(options.width, options.hidden).values()
    sharding = device_sharding()
    pool = BFLOAT16.Expert(*(jnp.zeros((options.slots, *b.shape), b.dtype, device=sharding) for b in buffers))
    fill, operand = way()
    run = jax.jit(fill, donate_argnums=0)
    size = BFLOAT16.expert_bytes(options.width, options.hidden)
    right, stays, speed = [], [], {}
    for count in options.moved:
        moves = moves_of(count, options)
        places = [array.unsafe_buffer_pointer() for array in pool]
        pool = jax.block_until_ready(run(pool, moves, operand))
        stays.append([array.unsafe_buffer_pointer() for array in pool] == places)
        pairs = zip(np.asarray(moves.sources), np.asarray(moves.targets), strict=True)
        right += [
            np.asarray(array[target]).tobytes() == np.asarray(given).tobytes()
            for source, target in pairs
            for array, given in zip(pool, experts[source], strict=True)
        ]
        held = [pool]

        def fills(held: list[Any] = held, moves: Moves = moves) -> None:
            held[0] = jax.block_until_ready(run(held[0], moves, operand))

        samples = harness.measure({"fill": waited(fills)}, options.rounds)["fill"].parts["seconds"]
        pool = held[0]
        speed[str(count)] = harness.spread(count * size / seconds / 1e9 for seconds in samples)
    return {"works": True, "right": all(right), "pool_stays": all(stays), "gb_per_s": speed}


def copied_by_python(experts: list[Any], options: Options) -> dict[str, Any]:
    """GB/s of copies that Python begins, and waits for together."""
    size, speed = BFLOAT16.expert_bytes(options.width, options.hidden), {}
    for count in options.moved:
        some = [experts[(7 * number + 3) % options.experts] for number in range(count)]
        call = waited(lambda some: [on_device(array) for expert in some for array in expert], some)
        seconds = harness.measure({"copy": call}, options.rounds)["copy"].parts["seconds"]
        speed[str(count)] = harness.spread(count * size / s / 1e9 for s in seconds)
    return {"works": True, "gb_per_s": speed}


def main(options: Options) -> dict[str, Any]:
    if options.quick:
        options = replace(options, width=64, hidden=32, experts=8, slots=4, moved=(1, 2), rounds=2)
    random, sharding = np.random.default_rng(0), host_sharding()
    buffers = BFLOAT16.buffers(options.width, options.hidden).values()

    def pinned(buffer: Any) -> jax.Array:
        raw = random.integers(0, 100, buffer.nbytes, np.uint8).view(buffer.dtype)
        return jax.block_until_ready(jax.device_put(raw.reshape(buffer.shape), sharding))

    experts = [BFLOAT16.Expert(*map(pinned, buffers)) for _ in range(options.experts)]
    result: dict[str, Any] = {
        "benchmark": "step_fill",
        "quick": options.quick,
        "machine": harness.machine(),
        "platform": jax.devices()[0].platform,
        "expert_bytes": BFLOAT16.expert_bytes(options.width, options.hidden),
        "ways": {"Python": copied_by_python(experts, options)},
    }
    for name, way in ways(experts).items():
        try:
            result["ways"][name] = tried(way, experts, options)
        except Exception as error:  # that is an answer
            said = f"{type(error).__name__}: {error}"
            result["ways"][name] = {"works": False, "why": said[:300]}
        harness.finish(options, result)  # what is known so far, should the next way end the process
    harness.print_table(
        f"Experts of {result['expert_bytes'] / 1e6:.1f} MB into slots, GB/s, median (p90)",
        ("way", "bytes right", "in place", *(f"{count} at once" for count in options.moved)),
        [row(name, found) for name, found in result["ways"].items()],
    )
    return result


def row(name: str, found: dict[str, Any]) -> tuple[str, ...]:
    if not found["works"]:
        return name, "no", found["why"][:60]
    said = {True: "yes", False: "no", None: "-"}
    speeds = (f"{s['median']:.1f} ({s['p90']:.1f})" for s in found["gb_per_s"].values())
    return name, said[found.get("right")], said[found.get("pool_stays")], *speeds


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
