"""Numba's decorators, with a cache of our own (`kernel_cache`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from numba.core import ccallback, sigutils

from layerscope_jax.support import target
from layerscope_jax.support.kernel_cache import KernelCache


def njit(*, cache: bool = False, **options: Any) -> Callable[[Callable], Any]:
    """As `numba.njit`. Where nothing can be compiled (`target.refusal`) a function stays as it is.

    With `inline="always"` a function is compiled as a part of those that call it; otherwise for itself too,
    and then optimised anew in each of them all the same.
    """

    def decorate(function: Callable) -> Any:
        if target.refusal() is not None:
            return function
        made = numba.njit(**options)(function)
        if cache:
            made._cache = KernelCache(function)  # where numba looks for its own; one that does not has none
        return made

    return decorate


def cfunc(signature: Any, *, cache: bool = False, **options: Any) -> Callable[[Callable], Any]:
    """As `numba.cfunc`, in the same way."""

    def decorate(function: Callable) -> Any:
        if not cache:
            return numba.cfunc(signature, **options)(function)
        made: Any = ccallback.CFunc(
            function, sigutils.normalize_signature(signature), locals={}, options=options
        )
        made._cache = KernelCache(function)
        made.compile()
        return made

    return decorate
