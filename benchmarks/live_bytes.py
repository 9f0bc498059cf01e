"""Bytes that an engine takes while it generates, on the device and in RAM, beside what it may take.

Counted are the buffers of all live JAX arrays, each byte once whoever shares it, and what Python and NumPy
allocate. Not counted is what XLA takes inside one jitted program: it never is an array.
"""

from __future__ import annotations

import contextlib
import gc
import tracemalloc
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np

from layerscope_jax import Engine, Model, ModelConfig, OffloadConfig
from layerscope_jax import engine as engines
from layerscope_jax.kernels import amx, loops
from layerscope_jax.kernels.cpu import CpuExperts
from layerscope_jax.kernels.host_kernels import AMX
from layerscope_jax.offload import link
from layerscope_jax.offload.executors import SharedExperts
from layerscope_jax.runtime.layerwise import LayerByLayer
from layerscope_jax.scheduling.baselines import Resident

SLACK = 1.05
"""By how much what is named may be exceeded: logits, routing and positions are not."""


class CountedCopies:
    """`jax.device_put` for an engine's link; knows what it has copied, and how much of that is alive.

    Attributes:
        moved: bytes copied so far.
    """

    def __init__(self) -> None:
        self.moved = 0
        self._alive: dict[int, int] = {}

    def __call__(self, array: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
        copy = jax.device_put(array, sharding)
        self.moved += copy.nbytes
        self._alive[id(copy)] = copy.nbytes
        weakref.finalize(copy, self._alive.pop, id(copy))
        return copy

    @property
    def alive(self) -> int:
        """Bytes of copies that somebody holds."""
        return sum(list(self._alive.values()))  # the link's thread may enter one meanwhile


class Watch:
    """Counts at every layer of every step of one call of an engine.

    Args:
        engine: one that copies by `copies`.
        copies: its link's.
        others: arrays that were there before and are not the engine's model's; held, so that none of them
            goes meanwhile.

    Attributes:
        device: most bytes in the device's memory in each phase, prefills of newcomers under "prefill".
            Rows that its experts write are counted, also where they are NumPy arrays.
        host: most bytes of arrays in RAM: pinned memory, and that of the host's own device. What the device
            shares with it is counted here.
        allocated: most bytes that Python and NumPy allocate, from before the engine is made; rows that are
            the device's left out.
        experts: most bytes of the link's copies at once.
        moved: bytes that the link copied.
        bank: bytes of all experts, once.
        budget: the engine's.
        named: what may be on the device, part by part.
        scratch: bytes that the host's kernels may keep.
        joined: prefills of newcomers after the first decode step.
        steps: [B, S] of each step.
        counted: how often.
    """

    def __init__(self, engine: Engine, copies: CountedCopies, others: list[jax.Array]):
        self.device = {"prefill": 0, "decode": 0}
        self.host = self.allocated = self.experts = self.joined = self.counted = 0
        self.moved = -copies.moved
        self.bank = engine.model.bank.total_bytes
        self.budget = engine.budget_bytes
        self.named: dict[str, int] = {}
        self.scratch = 0
        self._copies, self._others = copies, {id(array): array for array in others}
        self.steps: list[tuple[int, int]] = []
        self._caches: list[int] = []  # bytes: the slots', then those of each group of newcomers

    @contextlib.contextmanager
    def watching(self, engine: Engine) -> Iterator[None]:
        """For one call of `generate`."""
        runner = engine.runner
        with contextlib.ExitStack() as stack:
            replace = lambda *what: stack.enter_context(mock.patch.object(*what))  # noqa: E731
            replace(engines, "new_caches", self._noted(engines.new_caches))
            replace(runner, "step", self._begun(self._counted(runner.step, engine)))
            if isinstance(runner, LayerByLayer):
                # Asked before each layer is planned, and after each wait for copies.
                replace(runner.transfers, "arrivals", self._counted(runner.transfers.arrivals, engine))
            yield
        self.moved += self._copies.moved
        self.named = self._names(engine)
        if isinstance(runner, LayerByLayer):
            self.scratch = scratch_bytes(
                engine.model.config, runner.host_experts.cpu, max(rows * width for rows, width in self.steps)
            )

    def limit(self, phase: str) -> float:
        """Most bytes that may be on the device in a phase: there are no newcomers in "decode"."""
        return SLACK * (sum(self.named.values()) - (phase == "decode") * self.named["newcomers"])

    @property
    def of_limit(self) -> float:
        """The most that was taken on the device, by what might be."""
        return max(taken / self.limit(phase) for phase, taken in self.device.items() if taken)

    @property
    def ram(self) -> int:
        """Most bytes in RAM; an array that shares NumPy's memory would be counted twice."""
        return self.host + self.allocated

    @property
    def ram_limit(self) -> float:
        """Most bytes that may be in RAM: one copy of the experts, rows and what kernels compute them in."""
        return SLACK * (self.bank + self.named["rows"] + self.scratch)

    def _noted(self, new_caches: Callable) -> Callable:
        def call(*arguments: Any) -> Any:
            made = new_caches(*arguments)
            self._caches.append(sum(array.nbytes for array in jax.tree.leaves(made)))
            return made

        return call

    def _begun(self, step: Callable) -> Callable:
        def call(tokens: np.ndarray, *others: Any) -> Any:
            self.joined += tokens.shape[1] > 1 and any(width == 1 for _, width in self.steps)
            self.steps.append(tokens.shape)
            return step(tokens, *others)

        return call

    def _counted(self, function: Callable, engine: Engine) -> Callable:
        def call(*arguments: Any) -> Any:
            self._count(engine)
            return function(*arguments)

        return call

    def _count(self, engine: Engine) -> None:
        phase = "decode" if self.steps[-1][1] == 1 else "prefill"
        on_device, in_ram = live_bytes(engine.device, self._others)
        on_device += covered(spans(rows_of(engine)))
        self.device[phase] = max(self.device[phase], on_device)
        self.host = max(self.host, in_ram)
        self.experts = max(self.experts, self._copies.alive)
        self.counted += 1

    def _names(self, engine: Engine) -> dict[str, int]:
        model, runner = engine.model, engine.runner
        named = {
            "experts": engine.budget_bytes,
            "dense": covered(spans(jax.tree.leaves(model.dense))),
            "slots": self._caches[0],
            "newcomers": max(self._caches[1:], default=0),
            "rows": 0,
            "predictor": 0,
        }
        if isinstance(runner, LayerByLayer):
            tokens = sorted({rows * width for rows, width in self.steps})
            named["rows"] = rows_bytes(model.config, model.bank.dtype.itemsize, tokens)
            named["predictor"] = covered(spans(jax.tree.leaves(runner.forecasts._learner.params)))
            if isinstance(runner.device_experts, SharedExperts) and isinstance(runner.policy, Resident):
                named["experts"] = 0  # they stay where they are
        return named


def scratch_bytes(config: ModelConfig, cpu: CpuExperts, tokens: int) -> int:
    """Most that kernels need for an expert of so many tokens at most, in each thread."""
    width, hidden = config.hidden_size, config.moe_intermediate_size
    if cpu.kernel is AMX:
        sizes = np.minimum([amx.TILE, amx.PIECE], tokens)
        return cpu.threads * (amx.scratch_bytes(np.zeros(2, int), sizes, width, hidden) + 64)
    if cpu.kernel is not None:  # inputs, what is between them and outputs, and two rows of sums
        return cpu.threads * min(tokens, loops.PIECE) * 4 * (width + hidden + 32 + 2 * loops.APART)
    return 0


def watch(model: Model, config: OffloadConfig, call: Callable[[Engine], object]) -> Watch:
    """What an engine takes while it does `call`, one `generate`; done twice, each time by a new engine.

    What is allocated to compile would be counted too: let another engine of this config do the call before.
    """
    copies = CountedCopies()
    gc.collect()
    own = {id(array) for array in jax.tree.leaves((model.dense, model.bank.layers))}
    others = [array for array in live_arrays(model.device) if id(array) not in own]
    with mock.patch.object(link, "start_copy", copies):
        engine = Engine(model, config)
    with engine:
        found = Watch(engine, copies, others)
        with found.watching(engine):
            call(engine)
    del engine
    tracemalloc.start()  # only now: it makes counting several times as slow
    try:
        with Engine(model, config) as engine:
            call(engine)
            found.allocated = tracemalloc.get_traced_memory()[1] - sum(row.nbytes for row in rows_of(engine))
    finally:
        tracemalloc.stop()
    return found


def rows_of(engine: Engine) -> list[np.ndarray]:
    """NumPy arrays that stand for a device's memory, where the device is a CPU."""
    runner = engine.runner
    if isinstance(runner, LayerByLayer) and isinstance(runner.device_experts, SharedExperts):
        return list(runner.device_experts._arrays.values())
    return []


def rows_bytes(config: ModelConfig, itemsize: int, tokens: list[int]) -> int:
    """Bytes of hidden states before and after a layer, inputs of its experts, and the experts' rows.

    Args:
        config: of the model.
        itemsize: bytes of a number.
        tokens: of steps, padding counted, in rising order. Rows of two layers are alive, those of two sizes
            are kept.
    """
    rows = 2 * sum(size * config.experts_per_token + 1 for size in tokens[-2:])
    return (3 * tokens[-1] + rows) * config.hidden_size * itemsize


def spans(arrays: Iterable[jax.Array | np.ndarray]) -> list[tuple[int, int]]:
    """Where the numbers of arrays lie, from and to; of those that were donated, nowhere."""
    found = []
    for array in arrays:
        if isinstance(array, np.ndarray):
            found.append((array.ctypes.data, array.ctypes.data + array.nbytes))
        elif not array.is_deleted():
            start = array.unsafe_buffer_pointer()
            found.append((start, start + array.nbytes))
    return found


def covered(parts: Iterable[tuple[int, int]]) -> int:
    """Bytes in any of the spans: memory that several share is there once.

    >>> covered([(0, 10), (5, 12), (20, 21), (20, 21)])
    13
    """
    total = end = 0
    for start, stop in sorted(parts):
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total


def live_arrays(device: jax.Device) -> list[jax.Array]:
    """All of JAX's, on the platform of `device` and on CPUs."""
    return [array for platform in {device.platform, "cpu"} for array in jax.live_arrays(platform)]


def live_bytes(device: jax.Device, without: Collection[int] = ()) -> tuple[int, int]:
    """Bytes of live arrays in the memory of `device`, the accelerator or what stands for it, and in RAM.

    What they share is in RAM.

    Args:
        device: of the engine.
        without: `id`s of arrays that do not count.
    """
    here, elsewhere = [], []
    for array in live_arrays(device):
        if id(array) not in without:
            is_here = array.sharding.memory_kind == "device" and array.devices() == {device}
            (here if is_here else elsewhere).append(array)
    in_ram = spans(elsewhere)
    return covered([*in_ram, *spans(here)]) - covered(in_ram), covered(in_ram)
