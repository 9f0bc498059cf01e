"""Numba's decorator, on machines where nothing can be written too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def njit(**options: Any) -> Callable[[Callable], Any]:
    """As `numba.njit`. What `cache=True` can keep nowhere is compiled in each process anew.

    Numba keeps it beside the source, or where that is read-only in the user's cache folder (`NUMBA_CACHE_DIR`
    names another). Where neither can be written, as in some containers, it would refuse to go on.
    """

    def compiled(function: Callable) -> Any:
        try:
            return numba.njit(**options)(function)
        except RuntimeError:  # there is no place for a cache
            return numba.njit(**{**options, "cache": False})(function)

    return compiled
