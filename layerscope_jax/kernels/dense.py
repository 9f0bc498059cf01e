"""What computes the parts of a decode step that are no experts, by name."""

from __future__ import annotations

import numpy as np

from layerscope_jax.kernels.registry import REFERENCE, Kind, Work, choose

PARTS: tuple[Kind, ...] = ("products", "attention", "sums")


def dense_kernels(hidden_size: int, dtype: np.dtype, in_programs: bool) -> dict[str, str]:
    """Returns the name of what computes each part: products of D by D, attention, and the sums over experts.

    Args:
        hidden_size: D.
        dtype: of activations.
        in_programs: whether programs can call our own loops here (`Inside.table`).

    >>> dense_kernels(64, np.dtype(np.float32), in_programs=False)
    {'products': 'xla', 'attention': 'xla', 'sums': 'xla'}
    """
    sizes: dict[Kind, tuple[int, ...]] = {
        "products": (hidden_size, hidden_size),
        "attention": (1, 1, 1),  # a token a row: any size suits
        "sums": (hidden_size,),
    }
    names: dict[str, str] = {}
    for kind in PARTS:
        format = "float32" if kind == "attention" else dtype.name  # that of caches on a CPU
        kernel = choose(Work(kind, format, np.dtype(dtype), sizes[kind])) if in_programs else None
        names[kind] = REFERENCE if kernel is None else kernel.name
    return names
