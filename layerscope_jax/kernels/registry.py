"""Registry of kernels: which kernel computes a piece of work, and the fallback if none can.

All work has a reference in plain JAX. A kernel is a faster implementation of the same work: it says which
work it supports, and why, if so, it cannot run on this machine. The kernel that was registered last is asked
first. If a kernel that supports the work cannot run, the next kernel or the reference computes instead; one
warning says so, and so do the statistics of every later run.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from layerscope_jax.models.experts import SWIGLU, ExpertBody

Kind = Literal[
    "experts", "products", "attention", "latent_attention", "head_products", "delta_memory", "sums"
]


class Work(NamedTuple):
    """Description of a computation, as far as it matters for the choice of a kernel.

    Attributes:
        kind: "experts" of a layer; "products" with a layer's other weights; "attention";
            "latent_attention", and its "head_products", with a matrix for each head; "delta_memory" of gated
            DeltaNet; "sums" over each token's experts.
        format: for experts, the name of their format (`layerscope_jax.formats`); for other work, the name of
            the dtype of the weights or caches, or "int8" of weights that are packed (`Int8Matrix`).
        dtype: dtype of the activations, and of every result.
        sizes: (D, F) for experts; (K, N, N, ...) for products, with K summed over; (S, D_head, P, D_value)
            for attention, with S tokens per row and P positions in the cache; (S, R + E, P, R) for latent
            attention; (K, N) for products of heads; (D_k, D_v) for the memory of DeltaNet; (D,) for sums.
        platform: platform of the device that computes, as JAX names it: "cpu", "gpu", "tpu".
        body: of experts: their activation, and whether they have biases.
    """

    kind: Kind
    format: str
    dtype: np.dtype
    sizes: tuple[int, ...]
    platform: str = "cpu"
    body: ExpertBody = SWIGLU


def nothing_in_the_way(work: Work) -> str | None:
    """Returns None: the `obstacle` of a kernel that can always run."""
    return None


@dataclass(frozen=True)
class Kernel:
    """A faster implementation of a reference.

    The arguments of `run` depend on the kind. Its results must equal the reference's to rounding, and a row
    must have the same bits whatever other rows are computed with it.

    - "experts" on a CPU: `run(inputs, expert, outputs)` on NumPy arrays: inputs [M, D]; an `Expert` of the
      format, whose arrays are read-only; outputs [M, D], to be written. Several threads call it at once.
    - "experts" on another platform: `run(x, expert) -> [M, D]`, as `ExpertFormat.ffn`, in a jitted program.
    - the other kinds, on CPUs only, inside a jitted program: "products" `run(table, x, *weights) -> list`,
      "attention" `run(table, query, key, value, positions, window, scale, sinks)`, "latent_attention"
      `run(table, query, rows, positions, rank, scale)`, "head_products" `run(table, x, weights)`,
      "delta_memory" `run(table, query, key, value, fade, rate, state)`, "sums" `run(table, hidden, outputs,
      weights)`, like the functions `products`, `attention`, `latent_attention`, `head_products`,
      `delta_memory` and `combine` in `layerscope_jax.kernels`.
      `table` holds an address that the built-in loops need; other kernels ignore it.

    Attributes:
        name: name in the statistics.
        kind: kind of the work that it computes.
        suits: returns whether it supports a piece of work, by its format, dtype, sizes and platform.
        run: computes the work.
        obstacle: returns why supported work still cannot be computed on this machine (for example, because a
            compiler is missing), None if it can. Asked once for each piece of work.
        any_body: whether `suits` looks at `Work.body`; if not, it is asked about plain SwiGLU experts only.
    """

    name: str
    kind: Kind
    suits: Callable[[Work], bool]
    run: Any
    obstacle: Callable[[Work], str | None] = nothing_in_the_way
    any_body: bool = False


REFERENCE = "xla"
"""Name of the reference in statistics."""

_built_in: list[Kernel] = []
_registered: list[Kernel] = []
_fallbacks: dict[str, None] = {}
_lock = threading.RLock()


def register_kernel(kernel: Kernel) -> Kernel:
    """Registers a kernel, which is asked before all kernels that are registered already.

    Engines choose their kernels when they are made, so register kernels before making an engine.

    Args:
        kernel: its name must be unique among the kernels of its kind; registering the same kernel again has
            no effect.

    Returns:
        The kernel.

    Raises:
        ValueError: if it is not a `Kernel`, its kind is unknown, or its name is empty or taken.
    """
    if not isinstance(kernel, Kernel):
        raise ValueError(f"register_kernel takes a Kernel(name, kind, suits, run), got {kernel!r}")
    if kernel.kind not in get_args(Kind):
        raise ValueError(f"Kernel.kind must be one of {', '.join(get_args(Kind))}, got {kernel.kind!r}")
    if kernel.name == REFERENCE or not kernel.name:
        raise ValueError(
            f"Kernel.name must be text other than {REFERENCE!r}, the reference's name, got {kernel.name!r}"
        )
    with _lock:
        known = [*_registered, *_built_in]
        same = [other for other in known if (other.kind, other.name) == (kernel.kind, kernel.name)]
        if same and same != [kernel]:
            raise ValueError(
                f"a kernel named {kernel.name!r} for {kernel.kind} exists already; choose another name"
            )
        if not same:
            _registered.insert(0, kernel)
            choose.cache_clear()
    return kernel


def unregister_kernel(kernel: Kernel) -> None:
    """Removes a registered kernel; engines that have chosen it keep using it."""
    with _lock:
        _registered.remove(kernel)
        choose.cache_clear()


def built_in(kernel: Kernel) -> None:
    """Registers a built-in kernel, which is asked before the built-in kernels that are registered already."""
    with _lock:
        _built_in.insert(0, kernel)
        choose.cache_clear()


@functools.lru_cache(maxsize=4096)
def choose(work: Work) -> Kernel | None:
    """Returns the kernel for a piece of work; None for the reference.

    Warns:
        RuntimeWarning: once for each reason why a kernel that supports the work cannot run.
    """
    with _lock:
        known = [kernel for kernel in (*_registered, *_built_in) if kernel.kind == work.kind]
        for kernel in known:
            if not (kernel.any_body or work.body == SWIGLU) or not kernel.suits(work):
                continue
            reason = kernel.obstacle(work)
            if reason is None:
                return kernel
            warn_fallback(reason)
    return None


def warn_fallback(reason: str) -> None:
    """Warns, once per reason, that a kernel cannot compute work that it supports; see `fallbacks`."""
    if reason in _fallbacks:
        return
    _fallbacks[reason] = None
    warnings.warn(
        "a kernel cannot be compiled or called, so another kernel or XLA computes in its place, more slowly "
        f"(`RunStats.kernels` says which kernels computed experts): {reason}",
        RuntimeWarning,
        stacklevel=3,
    )


def fallbacks() -> tuple[str, ...]:
    """Returns why kernels could not compute work that they support in this process; empty if all could."""
    return tuple(_fallbacks)
