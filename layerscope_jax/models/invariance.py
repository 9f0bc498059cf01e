"""Programs in which each row's numbers depend on that row alone, whatever shares its batch and its step.

Most of what layers do is so by itself: a row of a product by our own loops, an activation, a softmax. Here
stands which programs need all of it to be so; parts that would go another way for another shape ask it while
they are traced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax
import jax.numpy as jnp

BLOCK = 16
"""Rows of a block."""

WHOLE = 32
"""Sizes of attention that are multiples of this go the same way on every CPU."""

_invariant: ContextVar[bool] = ContextVar("invariant", default=False)


@contextmanager
def invariant(wanted: bool = True) -> Iterator[None]:
    """While a program is traced within, no number depends on the shape of the batch or the step."""
    before = _invariant.set(wanted)
    try:
        yield
    finally:
        _invariant.reset(before)


def is_invariant() -> bool:
    """Returns whether the program that is traced must be one of these."""
    return _invariant.get()


def in_blocks(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """Returns `function` of each row of `x` [T, ...], which it is given in blocks of one size.

    So a product of XLA's, which goes another way for another number of rows, always goes the same way.

    >>> in_blocks(lambda rows: 2 * rows, jnp.arange(3.0))
    Array([0., 2., 4.], dtype=float32)
    """
    count = len(x)
    padded = jnp.pad(x, [(0, -count % BLOCK), *[(0, 0)] * (x.ndim - 1)])
    results = jax.lax.map(function, padded.reshape(-1, BLOCK, *x.shape[1:]))
    return results.reshape(len(padded), *results.shape[2:])[:count]


def lengthened(x: jax.Array, *axes: int) -> jax.Array:
    """Returns an array with zeros behind some axes, so that their sizes are multiples of `WHOLE`.

    >>> lengthened(jnp.ones((2, 40, 3)), 1).shape
    (2, 64, 3)
    """
    axes = tuple(axis % x.ndim for axis in axes)
    return jnp.pad(x, [(0, -size % WHOLE if axis in axes else 0) for axis, size in enumerate(x.shape)])
