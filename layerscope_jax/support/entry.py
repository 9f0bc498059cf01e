"""Runs a module as a command, with Ctrl-C handled before any slow import."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from layerscope_jax.support import interrupts


def run(module: str) -> NoReturn:
    """Calls a module's `main` and ends the process with what it returns, 0 for None.

    Args:
        module: name to import it by. A module that `python -m` runs passes its own name, before its other
            imports.
    """
    interrupts.install()
    occupy_standard_streams()
    from importlib import import_module

    from layerscope_jax.support import exits

    def call(args: list[str]) -> int | None:
        main = import_module(module).main
        interrupts.begin()
        return main()

    try:
        code = exits.run(call)
    finally:
        interrupts.close()
    sys.exit(code)


def occupy_standard_streams() -> None:
    """Opens the null device for each closed standard stream, so that no file opened later gets its number."""
    number = os.open(os.devnull, os.O_RDWR)
    while number <= 2:
        number = os.open(os.devnull, os.O_RDWR)
    os.close(number)
