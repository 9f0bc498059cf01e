"""Numba's decorators with this package's cache (`kernel_cache`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from numba.core import ccallback, sigutils

from layerscope_jax.support import target
from layerscope_jax.support.kernel_cache import KernelCache


def njit(*, cache: bool = False, **options: Any) -> Callable[[Callable], Any]:
    """Compiles as `numba.njit` does; returns the function itself if nothing can be compiled.

    The latter is so if `target.refusal` gives a reason. With `inline="always"` a function is compiled only as
    a part of its callers. Otherwise it is compiled by itself too, and optimised again in each caller.
    """

    def decorate(function: Callable) -> Any:
        if target.refusal() is not None:
            return function
        made = numba.njit(**options)(function)
        if cache:
            made._cache = KernelCache(function)  # numba's cache attribute; a numba without it has no cache
        return made

    return decorate


def cfunc(signature: Any, *, cache: bool = False, **options: Any) -> Callable[[Callable], Any]:
    """Compiles as `numba.cfunc` does, with the same cache."""

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
