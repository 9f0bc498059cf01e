"""Numba's decorators, on machines where nothing can be written too."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numba


def njit(**options: Any) -> Callable[[Callable], Any]:
    """As `numba.njit`. What `cache=True` can keep nowhere is compiled in each process anew.

    With `inline="always"` a function is compiled as a part of those that call it; otherwise for itself too,
    and then optimised anew in each of them all the same.

    Numba keeps it beside the source, or where that is read-only in the user's cache folder (`NUMBA_CACHE_DIR`
    names another). Where neither can be written, as in some containers, it would refuse to go on.
    """
    return functools.partial(decorated, numba.njit, options)


def cfunc(signature: Any, **options: Any) -> Callable[[Callable], Any]:
    """As `numba.cfunc`, in the same way."""
    return functools.partial(decorated, functools.partial(numba.cfunc, signature), options)


def decorated(decorator: Callable, options: dict[str, Any], function: Callable) -> Any:
    try:
        return decorator(**options)(function)
    except RuntimeError:  # there is no place for a cache
        return decorator(**{**options, "cache": False})(function)
