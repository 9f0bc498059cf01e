"""Experts computed by this machine's CPU: few tokens by our own loops, many by XLA's products."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np

from layerscope_jax.experts.compute import ExpertWeights, ffn
from layerscope_jax.experts.grouping import Group, next_power
from layerscope_jax.experts.kernels import run_experts

FEW = {"bfloat16": 32, "float32": 8}
"""Largest row bucket that `kernels` computes: for more rows XLA's products, which know the CPU's own
instructions for them, are as fast."""

SHARE_BYTES = 1 << 20
"""Bytes of weights that make waking another thread worth while: some 50 us of reading."""


def by_kernel(group: Group, dtype: np.dtype) -> bool:
    """Whether a group's rows are few. It hangs on an expert's own tokens alone, and so do its bits."""
    return group.slots.shape[1] <= FEW.get(np.dtype(dtype).name, 0)


def expert_rows(
    inputs: jax.Array, slots: jax.Array, weights: tuple[ExpertWeights, ...], choices: int
) -> jax.Array:
    """N experts of M rows each, unrolled: [T, D], [N, M] -> [N * M, D]."""
    token = jnp.minimum(slots // choices, inputs.shape[0] - 1)  # padding reads any row
    return jnp.concatenate([ffn(inputs[token[i]], expert) for i, expert in enumerate(weights)])


grouped_rows = functools.partial(jax.jit, static_argnames="choices")(expert_rows)


class CpuExperts:
    """Computes rows of experts whose weights are in this machine's memory.

    Args:
        device: the JAX CPU device of XLA's products.
        threads: that share the weights of a call out among them, the caller's own counted.
    """

    def __init__(self, device: jax.Device, threads: int):
        self.device = device
        self.threads = threads
        self._pool = ThreadPoolExecutor(max(1, threads - 1), thread_name_prefix="layerscope-cpu")

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def compute(
        self,
        inputs: np.ndarray,
        groups: Sequence[Group],
        weights: Callable[[int], ExpertWeights],
        choices: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows of `groups`.

        Args:
            inputs: [T, D].
            groups: as `Assignments.groups` makes them.
            weights: of an expert, in memory that this process reads.
            choices: K.

        Returns:
            slots [R] and rows [R, D], R a power of two, so that placing them compiles for few shapes;
            what is more than was asked for goes to slot T * K, which nobody reads.
        """
        nowhere = len(inputs) * choices
        few = [group for group in groups if by_kernel(group, inputs.dtype)]
        many = [group for group in groups if not by_kernel(group, inputs.dtype)]
        parts = []
        if many:
            local = jax.device_put(inputs, self.device)
            for group in many:
                arrays = tuple(weights(expert) for expert in group.experts)
                parts.append(grouped_rows(local, group.slots, arrays, choices))
        total = sum(group.rows for group in few) + sum(group.slots.size for group in many)
        slots = np.full(next_power(total), nowhere, np.int32)
        rows = np.zeros((len(slots), inputs.shape[1]), inputs.dtype)
        start = self._few(inputs, few, weights, choices, slots, rows) if few else 0
        for group, part in zip(many, parts, strict=True):
            end = start + group.slots.size
            slots[start:end] = group.slots.reshape(-1)
            rows[start:end] = np.asarray(part)
            start = end
        return slots, rows

    def _few(
        self,
        inputs: np.ndarray,
        groups: Sequence[Group],
        weights: Callable[[int], ExpertWeights],
        choices: int,
        slots: np.ndarray,
        rows: np.ndarray,
    ) -> int:
        """Fills the first of `slots` and `rows`; gives how many."""
        nowhere, ends, addresses, filled, size = len(inputs) * choices, [], [], 0, 0
        held = []  # what the addresses are of must live until the end
        for group in groups:
            for expert, wanted in zip(group.experts, group.slots, strict=True):
                real = wanted[wanted < nowhere]
                if not len(real):
                    continue  # padding repeats an expert
                slots[filled : filled + len(real)] = real
                filled += len(real)
                ends.append(filled)
                held.append(weights(expert))
                addresses.append([matrix.unsafe_buffer_pointer() for matrix in held[-1]])
                size += sum(matrix.nbytes for matrix in held[-1])
        hidden = held[0].gate.shape[1]
        words = np.uint16 if inputs.dtype.itemsize == 2 else inputs.dtype
        arrays = np.array(addresses, np.int64), np.array(ends, np.int64), slots
        floats = np.ascontiguousarray(inputs).view(words), hidden, rows.view(words)

        def part(begin: int, end: int) -> None:
            run_experts(*arrays, choices, *floats, begin, end)

        shares = min(self.threads, len(ends), max(1, size // SHARE_BYTES))
        cuts = [round(len(ends) * share / shares) for share in range(shares + 1)]
        others = [self._pool.submit(part, begin, end) for begin, end in pairwise(cuts[1:])]
        part(0, cuts[1])
        for other in others:
            other.result()
        return filled
