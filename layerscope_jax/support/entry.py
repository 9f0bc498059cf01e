"""Runs a module as a command: Ctrl-C is seen to before anything is imported that takes its time."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from layerscope_jax.support import interrupts


def run(module: str) -> NoReturn:
    """Calls a module's `main` and ends the process with what it returns, 0 for None.

    Args:
        module: imported by this name. A module that `python -m` runs gives its own here, before it imports
            anything else.
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
    """Puts nothing where a standard stream is closed: a file that is opened later would come to be there."""
    number = os.open(os.devnull, os.O_RDWR)
    while number <= 2:
        number = os.open(os.devnull, os.O_RDWR)
    os.close(number)
