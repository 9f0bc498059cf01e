"""Cache of compiled functions on disk, read only if a file is complete and compiled from these sources.

Numba's own cache identifies a function by the file that defines it, so it misses changes of code that is
inlined from another file; it reads damaged files; and two processes that write at the same time can read each
other's code as their own. In this cache, a folder is named by a hash of everything that the machine code
depends on, including all sources with compiled functions, and each file begins with the hash of its content.
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
from layerscope_jax.support.compile_turns import Turns
from layerscope_jax.support.files import user_cache, write_file

PACKAGE = Path(__file__).parents[1]

KEPT = 8
"""Number of most recently used folders to keep: of other sources, versions, CPUs and settings."""

FORGOTTEN_S = 86_400
"""Age at which an unfinished file is removed: the process that began it has ended."""

SUFFIX = ".kernel"

logger = logging.getLogger("layerscope_jax")
turns = Turns()


class KernelCache:
    """Cache of one function's compiled versions (one per signature), with the interface that numba expects.

    If anything is wrong with a file or a folder, the function is compiled again.

    Args:
        function: the Python function.
    """

    def __init__(self, function: Callable):
        self._function = function
        self._enabled = True

    @property
    def cache_path(self) -> str | None:
        """Folder that files are written to if possible."""
        return str(folders()[0]) if folders() else None

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def flush(self) -> None:
        """Removes every compiled version of the function."""
        for folder in folders():
            for file in folder.glob(f"{self._name()}-*{SUFFIX}"):
                discard(file)

    def load_overload(self, signature: Any, context: Any) -> Any:
        """Returns the compiled version for a signature; None if there is no complete file of it."""
        if not self._enabled:
            return None
        context.refresh()
        key = self._key(signature)
        result = self._found(key, context)
        if result is None:
            say_if_cold()
            if any(turns.take(file) for file in self._kept_in(key)):
                result = self._found(key, context)  # which another process may have kept meanwhile
            if result is not None:
                self._end_turn(key)
        return result

    def save_overload(self, signature: Any, compiled: Any) -> None:
        """Saves a compiled version, if a folder can be written to."""
        if not self._enabled:
            return
        key = self._key(signature)
        try:
            self._save(key, compiled)
        finally:
            self._end_turn(key)

    def _save(self, key: tuple[str, ...], compiled: Any) -> None:
        try:
            if compiled.lifted or compiled.library.has_dynamic_globals:
                return
            content = dumps((key, compiled._reduce()))
        except Exception as error:  # another version of numba, with other internals
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

    def _kept_in(self, key: tuple[str, ...]) -> list[Path]:
        """Returns the file that a version is kept in, if its folder can be made; otherwise none."""
        with suppress(OSError):
            for folder in folders()[:1]:
                make(folder)
                return [folder / self._file(key)]
        return []

    def _end_turn(self, key: tuple[str, ...]) -> None:
        for folder in folders()[:1]:
            turns.end(folder / self._file(key))

    def _found(self, key: tuple[str, ...], context: Any) -> Any:
        for folder in folders():
            file = folder / self._file(key)
            try:
                result = read(file, key, context)
            except FileNotFoundError:
                continue
            except Exception as error:  # any kind of damage
                logger.debug("%s is compiled anew: %s: %s", file, type(error).__name__, error)
                discard(file)
                continue
            touch(folder)
            return result
        return None

    def _name(self) -> str:
        full = f"{self._function.__module__.rpartition('.')[2]}.{self._function.__qualname__}"
        return full.replace("<", "").replace(">", "")

    def _key(self, signature: Any) -> tuple[str, ...]:
        """Returns what identifies a compiled version in a folder: function, signature and closure."""
        code = self._function.__code__
        cells = tuple(named(cell.cell_contents) for cell in self._function.__closure__ or ())
        closed = hashlib.sha256(code.co_code + (dumps(cells) if cells else b"")).hexdigest()
        return self._name(), str(code.co_firstlineno), repr(signature), closed

    def _file(self, key: tuple[str, ...]) -> str:
        return f"{self._name()}-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}{SUFFIX}"


def named(value: Any) -> Any:
    """Returns what a closure's value adds to the key: for a compiled function, where it is defined, and what
    its own closure adds."""
    function = getattr(value, "py_func", None)
    if function is None:
        return value
    closed = tuple(named(cell.cell_contents) for cell in function.__closure__ or ())
    return function.__module__, function.__qualname__, function.__code__.co_firstlineno, closed


def read(file: Path, key: tuple[str, ...], context: Any) -> Any:
    """Returns the compiled function in a file.

    Raises:
        ValueError: if the file is damaged, or holds another function.
    """
    content = file.read_bytes()
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        raise ValueError("it is damaged")
    owner, parts = pickle.loads(content[32:])
    if owner != key:
        raise ValueError(f"it is of {owner}")
    return numba.core.compiler.CompileResult._rebuild(context, *parts)


def write(file: Path, content: bytes) -> None:
    """Writes a file with its digest in front, completely or not at all, even if other processes write it too.

    Raises:
        OSError, ValueError: if it cannot be written.
    """
    make(file.parent)
    write_file(file, hashlib.sha256(content).digest() + content)


def make(folder: Path) -> None:
    """Makes a folder of compiled functions, for others to read if it is beside the sources."""
    folder.mkdir(mode=0o777 if folder.is_relative_to(PACKAGE) else 0o700, parents=True, exist_ok=True)


def discard(file: Path) -> None:
    """Removes a file, or whatever else has its name, if that is permitted."""
    with suppress(OSError):
        if file.is_dir() and not file.is_symlink():
            shutil.rmtree(file)
        else:
            file.unlink(missing_ok=True)


@functools.cache
def folders() -> tuple[Path, ...]:
    """Returns the folders that may hold versions for these sources and this target; the first is preferred.

    They are beside the sources and, if that is read-only, in the user's cache folder; if `NUMBA_CACHE_DIR`
    names a folder, only there. Empty if the sources cannot be read, as in a zip archive.
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
    """Yields the files that contain or generate compiled functions: those that mention numba or `njit`."""
    for file in sorted(package.rglob("*.py")):
        content = file.read_bytes()
        if b"numba" in content or b"njit" in content:
            yield str(file.relative_to(package)), content


@functools.cache
def say_if_cold() -> None:
    """Logs, once, that compiling will take a while, if no compiled version exists yet."""
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
    """Removes, once a process, the least recently used folders beside this one, and unfinished files."""
    with suppress(OSError):
        beside = sorted(folder.parent.glob("kernels-*"), key=used, reverse=True)
        for old in [other for other in beside if other != folder][KEPT - 1 :]:
            shutil.rmtree(old, ignore_errors=True)
        for rest in folder.glob("*.tmp"):
            if time.time() - used(rest) > FORGOTTEN_S:
                discard(rest)


def used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # another process has removed it
        return 0.0
