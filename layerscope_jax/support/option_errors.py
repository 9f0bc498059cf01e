"""Errors of commands that name the option whose value is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from layerscope_jax.support.exits import REFUSED, code_of, described
from layerscope_jax.support.locks import locked, made


@contextmanager
def option(name: str) -> Iterator[None]:
    """Puts the name of an option before what is wrong with its value.

    Raises:
        ValueError: with that.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if code_of(error) != REFUSED:
            raise
        raise ValueError(f"{name}: {described(error)}") from error


@contextmanager
def writing(name: str, file: Path) -> Iterator[None]:
    """Keeps other runs away from the file that an option names, in a folder that is made if needed.

    Raises:
        ValueError: if it cannot be written, which shows here before anything is computed.
    """
    with option(name):
        is_folder = file.is_dir()  # of a name that is too long nothing can be asked
    if is_folder:
        raise ValueError(f"{name} must be a file, got the folder {file}")
    with ExitStack() as stack:
        with option(name):
            stack.enter_context(made(file.resolve().parent))
            stack.enter_context(locked(file))
        yield
