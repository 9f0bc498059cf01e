"""Compiled functions kept on disk from process to process: read only if whole, and made of these sources.

Numba has a cache of its own. It knows a function by the file that defines it, so that a change of what is
inlined from another file goes unseen; it reads damaged files as they are; and two processes that write at the
same time can take each other's code for their own. Here a folder is named by everything that decides what
comes out, all sources with compiled functions included, and each file begins with the hash of its content.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import pickle
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba import config
from numba.core.serialize import dumps

from layerscope_jax.support import target
from layerscope_jax.support.files import user_cache, write_file

PACKAGE = Path(__file__).parents[1]

KEPT = 8
"""Folders that are kept, those used last: of other sources, versions, CPUs and settings."""

FORGOTTEN_S = 86_400
"""Age of a file that was never finished: whoever began it is gone."""

SUFFIX = ".kernel"

logger = logging.getLogger("layerscope_jax")


class KernelCache:
    """A function's compiled forms on disk, as numba's dispatchers ask for them.

    Whatever is wrong with a file or a folder, the function is compiled anew.

    Args:
        function: before it is compiled.
    """

    def __init__(self, function: Callable):
        self._function = function
        self._enabled = True

    @property
    def cache_path(self) -> str | None:
        """Where files are written first."""
        return str(folders()[0]) if folders() else None

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def flush(self) -> None:
        """Forgets every form of the function."""
        for folder in folders():
            for file in folder.glob(f"{self._name()}-*{SUFFIX}"):
                discard(file)

    def load_overload(self, signature: Any, context: Any) -> Any:
        """The form of a signature; None if it is not there, or not whole."""
        if not self._enabled:
            return None
        context.refresh()
        key = self._key(signature)
        for folder in folders():
            file = folder / self._file(key)
            try:
                result = read(file, key, context)
            except FileNotFoundError:
                continue
            except Exception as error:  # damaged in a way that nobody thought of
                logger.debug("%s is compiled anew: %s: %s", file, type(error).__name__, error)
                discard(file)
                continue
            touch(folder)
            return result
        say_if_cold()
        return None

    def save_overload(self, signature: Any, compiled: Any) -> None:
        """Keeps a form, where a folder can be written to."""
        if not self._enabled:
            return
        key = self._key(signature)
        try:
            if compiled.lifted or compiled.library.has_dynamic_globals:
                return
            content = dumps((key, compiled._reduce()))
        except Exception as error:  # another numba, which does it in another way
            logger.debug("%s is not kept: %s: %s", self._name(), type(error).__name__, error)
            return
        for folder in folders():
            try:
                write(folder / self._file(key), content)
            except (OSError, ValueError) as error:
                logger.debug("%s cannot be written to: %s", folder, error)
                continue
            prune(folder)
            return

    def _name(self) -> str:
        full = f"{self._function.__module__.rpartition('.')[2]}.{self._function.__qualname__}"
        return full.replace("<", "").replace(">", "")

    def _key(self, signature: Any) -> tuple[str, ...]:
        """What tells a form from others in a folder: whose it is, of which types, and what it closes over."""
        code = self._function.__code__
        cells = tuple(named(cell.cell_contents) for cell in self._function.__closure__ or ())
        closed = hashlib.sha256(code.co_code + (dumps(cells) if cells else b"")).hexdigest()
        return self._name(), str(code.co_firstlineno), repr(signature), closed

    def _file(self, key: tuple[str, ...]) -> str:
        return f"{self._name()}-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}{SUFFIX}"


def named(value: Any) -> Any:
    """What is closed over; of a compiled function, which is another in each process, where it is defined."""
    function = getattr(value, "py_func", None)
    if function is None:
        return value
    return function.__module__, function.__qualname__, function.__code__.co_firstlineno


def read(file: Path, key: tuple[str, ...], context: Any) -> Any:
    """The compiled function in a file.

    Raises:
        ValueError: if the file is not as it was written, or another function's.
    """
    content = file.read_bytes()
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        raise ValueError("it is damaged")
    owner, parts = pickle.loads(content[32:])
    if owner != key:
        raise ValueError(f"it is of {owner}")
    return numba.core.compiler.CompileResult._rebuild(context, *parts)


def write(file: Path, content: bytes) -> None:
    """Writes a file whole or not at all, whoever else writes it, with its digest before it.

    Raises:
        OSError, ValueError: if it cannot be written.
    """
    file.parent.mkdir(mode=0o777 if file.is_relative_to(PACKAGE) else 0o700, parents=True, exist_ok=True)
    write_file(file, hashlib.sha256(content).digest() + content)


def discard(file: Path) -> None:
    """Removes what lies in a file's place, whatever it is; leaves it where that is not allowed."""
    with suppress(OSError):
        if file.is_dir() and not file.is_symlink():
            shutil.rmtree(file)
        else:
            file.unlink(missing_ok=True)


@functools.cache
def folders() -> tuple[Path, ...]:
    """Where forms may be, those of these sources and this target; the first that can be is written to.

    Beside the sources, or where that is read-only in the user's cache folder; where `NUMBA_CACHE_DIR` names
    a folder, there alone. None where the sources cannot be read, as in a zip archive.
    """
    sources = list(compiled_sources(PACKAGE))
    if not sources:
        return ()
    parts = [numba.__version__, llvmlite.__version__, str(sys.implementation.cache_tag), target.describe()]
    result = hashlib.sha256("\n".join(parts).encode())
    for name, content in sources:
        result.update(f"\n{name} {len(content)}\n".encode() + content)
    name = f"kernels-{result.hexdigest()[:16]}"
    if config.CACHE_DIR:
        return (Path(config.CACHE_DIR) / "layerscope_jax" / name,)
    bases = [PACKAGE / "__pycache__"]
    with suppress(RuntimeError):  # no home
        bases.append(user_cache())
    return tuple(base / name for base in bases)


def compiled_sources(package: Path) -> Iterable[tuple[str, bytes]]:
    """The files that functions to be compiled are in, or made by: those that speak of numba or `njit`."""
    for file in sorted(package.rglob("*.py")):
        content = file.read_bytes()
        if b"numba" in content or b"njit" in content:
            yield str(file.relative_to(package)), content


@functools.cache
def say_if_cold() -> None:
    """Says, once, that this will take a while: where not a single form is there yet."""
    if any(any(folder.glob(f"*{SUFFIX}")) for folder in folders()):
        return
    what = "compiling kernels for this CPU, which takes up to a minute"
    for folder in folders():
        with suppress(OSError, ValueError):
            write(folder / "probe", b"")
            (folder / "probe").unlink()
            logger.info("%s; they are kept in %s for the next time", what, folder)
            return
    logger.info(
        "%s, in each process anew: no folder for them can be written to (NUMBA_CACHE_DIR names another)", what
    )


@functools.cache
def touch(folder: Path) -> None:
    """Marks a folder, once a process, as used."""
    with suppress(OSError):
        os.utime(folder)


@functools.cache
def prune(folder: Path) -> None:
    """Removes, once a process, the folders beside this one used longest ago, and what was not finished."""
    with suppress(OSError):
        beside = sorted(folder.parent.glob("kernels-*"), key=used, reverse=True)
        for old in [one for one in beside if one != folder][KEPT - 1 :]:
            shutil.rmtree(old, ignore_errors=True)
        for rest in folder.glob("*.tmp"):
            if time.time() - used(rest) > FORGOTTEN_S:
                discard(rest)


def used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # another process has removed it
        return 0.0
