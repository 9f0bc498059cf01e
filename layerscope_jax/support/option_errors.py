"""Puts the name of a command's option before an error about its value."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from layerscope_jax.support.exits import REFUSED, code_of, described
from layerscope_jax.support.locks import locked, made


@contextmanager
def option(name: str) -> Iterator[None]:
    """Puts the name of an option before errors about its value within the `with` block.

    Raises:
        ValueError: with the name in front.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if code_of(error) != REFUSED:
            raise
        raise ValueError(f"{name}: {described(error)}") from error


@contextmanager
def writing(name: str, file: Path) -> Iterator[None]:
    """Keeps other runs away from the file that an option names; creates its folder if needed.

    Raises:
        ValueError: if the file cannot be written; raised before anything is computed.
    """
    with option(name):
        is_folder = file.is_dir()  # raises OSError for a name that is too long
    if is_folder:
        raise ValueError(f"{name} must be a file, got the folder {file}")
    with ExitStack() as stack:
        with option(name):
            stack.enter_context(made(file.resolve().parent))
            stack.enter_context(locked(file))
        yield
