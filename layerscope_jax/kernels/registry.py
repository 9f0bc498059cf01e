"""Kernels by what they can do: which of them computes a piece of work, and what is said where none can.

Everything has a reference in plain JAX. A kernel is something faster that computes the same: it says what
work suits it, and what, if anything, keeps it from working on this machine. The one that was registered last
is asked first. Where a kernel that suits cannot be had, the next one computes, or the reference; that is said
in one warning, and in the statistics of every run after it.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

Kind = Literal["experts", "products", "attention", "sums"]


class Work(NamedTuple):
    """What is to be computed, as far as it matters for the choice of a kernel.

    Attributes:
        kind: experts of a layer; products with a layer's other weights; attention; the sums over each
            token's experts.
        format: name of the format of experts (`layerscope_jax.formats`); of other work, of the dtype of
            weights or caches.
        dtype: of activations, which every result has too.
        sizes: of experts (D, F); of products (K, N, N, ...) with K summed over; of attention (S, D_head, P)
            with S tokens a row and P positions in the cache; of sums (D,).
        platform: of the device that computes, as JAX calls it: "cpu", "gpu", "tpu".
    """

    kind: Kind
    format: str
    dtype: np.dtype
    sizes: tuple[int, ...]
    platform: str = "cpu"


def nothing_in_the_way(work: Work) -> str | None:
    """The `obstacle` of a kernel that works wherever it suits."""
    return None


@dataclass(frozen=True)
class Kernel:
    """Something faster than the reference.

    What `run` takes depends on the kind. All that it writes or returns must be equal to the reference to
    rounding, and a row must have the same bits whatever other rows are computed with it.

    - "experts" on a CPU: `run(inputs, expert, outputs)`, NumPy arrays: inputs [M, D]; an `Expert` of the
      format, of read-only arrays; outputs [M, D], to be written. Several threads call it at once.
    - "experts" on another platform: `run(x, expert) -> [M, D]`, as `ExpertFormat.ffn`, in a jitted program.
    - the others, on CPUs only, inside a jitted program: "products" `run(table, x, *weights) -> list`,
      "attention" `run(table, query, key, value, positions, window)`, "sums" `run(table, hidden, outputs,
      weights)`, as the references `products`, `attention` and `combine` in `layerscope_jax.kernels`. `table`
      holds an address that our own loops need and others pass over.

    Attributes:
        name: in the statistics.
        kind: of the work that it does.
        suits: whether it can do a piece of work, by its format, types, sizes and platform.
        run: does it.
        obstacle: of work that suits: why it cannot be done on this machine all the same (a compiler is not
            there, say), None if it can. Asked once for each piece of work.
    """

    name: str
    kind: Kind
    suits: Callable[[Work], bool]
    run: Any
    obstacle: Callable[[Work], str | None] = nothing_in_the_way


REFERENCE = "xla"
"""Name of the reference in statistics."""

_built_in: list[Kernel] = []
_registered: list[Kernel] = []
_fallbacks: dict[str, None] = {}
_lock = threading.RLock()


def register_kernel(kernel: Kernel) -> Kernel:
    """Makes a kernel known, to be asked before all that are known already.

    Engines choose kernels as they are made: register before.

    Raises:
        ValueError: if it is not a kernel, or another one of its kind has its name.
    """
    if not isinstance(kernel, Kernel):
        raise ValueError(f"register_kernel takes a Kernel(name, kind, suits, run), got {kernel!r}")
    if kernel.kind not in get_args(Kind):
        raise ValueError(f"Kernel.kind must be one of {', '.join(get_args(Kind))}, got {kernel.kind!r}")
    if kernel.name == REFERENCE or not kernel.name:
        raise ValueError(f"Kernel.name must be one of its own, got {kernel.name!r}")
    with _lock:
        known = [*_registered, *_built_in]
        same = [other for other in known if (other.kind, other.name) == (kernel.kind, kernel.name)]
        if same and same != [kernel]:
            raise ValueError(
                f"there is a kernel {kernel.name!r} for {kernel.kind} already; name it otherwise"
            )
        if not same:
            _registered.insert(0, kernel)
            choose.cache_clear()
    return kernel


def unregister_kernel(kernel: Kernel) -> None:
    """Forgets a kernel that was registered; engines that have chosen it go on with it."""
    with _lock:
        _registered.remove(kernel)
        choose.cache_clear()


def built_in(kernel: Kernel) -> None:
    """Makes a kernel of our own known, to be asked before those of our own that are known already."""
    with _lock:
        _built_in.insert(0, kernel)
        choose.cache_clear()


@functools.lru_cache(maxsize=4096)
def choose(work: Work) -> Kernel | None:
    """Returns the kernel for a piece of work; None for the reference.

    Warns:
        RuntimeWarning: once for each reason why a kernel that suits cannot be had.
    """
    with _lock:
        known = [kernel for kernel in (*_registered, *_built_in) if kernel.kind == work.kind]
        for kernel in filter(lambda kernel: kernel.suits(work), known):
            reason = kernel.obstacle(work)
            if reason is None:
                return kernel
            warn_fallback(reason)
    return None


def warn_fallback(reason: str) -> None:
    """Warns, once for a reason, that a kernel does not compute what suits it; see `fallbacks`."""
    if reason in _fallbacks:
        return
    _fallbacks[reason] = None
    warnings.warn(
        "a kernel of our own cannot be compiled or called, so that another or XLA computes in its place, "
        f"more slowly (`RunStats.kernels` says which computed experts): {reason}",
        RuntimeWarning,
        stacklevel=3,
    )


def fallbacks() -> tuple[str, ...]:
    """Returns why kernels that suit were not used in this process so far; empty where all could be."""
    return tuple(_fallbacks)
