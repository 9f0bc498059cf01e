"""Keeps compiled programs on disk from process to process, and counts compilations."""

from __future__ import annotations

import hashlib
import importlib
import os
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from layerscope_jax.support import machine
from layerscope_jax.support.files import user_cache
from layerscope_jax.support.units import parse_bytes

CHECKED = ".checked"
"""Name of a file; programs written before its last change have been checked already."""

ZSTD = b"\x28\xb5\x2f\xfd"
"""First bytes of a file that JAX compressed with zstandard; others use zlib."""


def use_compilation_cache(folder: str | Path | None = None, *, max_size: int | str = "1GiB") -> str | None:
    """Keeps what JAX compiles on disk, for the next process that needs the same programs.

    The `layerscope` command does this by itself. In a program, call it once, before the first engine: the
    cache is a setting of JAX for everything that the process compiles, so the library leaves it to the
    application. A cache that is already on (`jax_compilation_cache_dir`, `JAX_COMPILATION_CACHE_DIR`) stays
    as it is, and `JAX_ENABLE_COMPILATION_CACHE=0` keeps all caches off.

    Every program is kept, however quickly it was compiled, because a model consists of many small programs.
    Each call removes files that were only partly written, and the least recently used programs until no more
    than `max_size` is left. The folder may be deleted at any time. Do not share it: whoever can write to it
    can make this process run any code.

    Args:
        folder: created if needed. None for a folder of this user and kind of CPU: `layerscope_jax` in
            `$XDG_CACHE_HOME` or `~/.cache` (on macOS `~/Library/Caches`, on Windows `%LOCALAPPDATA%`).
        max_size: maximum size of the programs in the folder or, for the default folder, of those for all
            kinds of CPU together. JAX's own limit (`jax_compilation_cache_max_size`), if set, is used
            instead.

    Returns:
        The folder in use; None if caches are switched off.

    Raises:
        ValueError: if JAX already keeps a cache in another folder than `folder`, or if `max_size` is not a
            size.
        OSError: if the folder cannot be created or written to.
    """
    most = parse_bytes(max_size, "max_size")
    if not jax.config.values["jax_enable_compilation_cache"]:
        return None
    current = jax.config.values["jax_compilation_cache_dir"]
    if current is not None:
        if folder is not None and str(folder) != current:
            raise ValueError(
                f"folder must be the one in which JAX keeps a cache already, {current}, got {folder}; leave "
                "it out, or set jax_compilation_cache_dir before JAX compiles anything"
            )
        return current
    path = default_folder() if folder is None else Path(folder)
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not os.access(path, os.W_OK):
        raise PermissionError(f"{path}: expected a folder that can be written to")
    if jax.config.values["jax_compilation_cache_max_size"] == -1:
        # JAX's own limit needs another package, and a file of access times beside each program, or it fails.
        with suppress(OSError):  # another process may be pruning too
            others = (
                [] if folder is not None else [other for other in path.parent.iterdir() if other.is_dir()]
            )
            prune([path, *(other for other in others if other != path)], most)
            discard_damaged(path)
    # By default JAX keeps only programs that took a second to compile; few programs of a model do on a CPU.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_compilation_cache_dir", str(path))
    return str(path)


def default_folder() -> Path:
    """Returns this user's cache folder for this kind of CPU.

    Compiled programs use instructions of their CPU, and JAX does not tell CPUs apart: machines that share a
    home folder would read programs that they cannot run.
    """
    kind = hashlib.sha256(f"{machine.cpu_name()} {machine.cpu_features()}".encode()).hexdigest()
    return user_cache() / kind[:12]


def discard_damaged(folder: Path) -> None:
    """Removes incomplete programs among those written since the last check.

    A full disk or a killed process leaves such files. JAX would read each in every process, warn, compile the
    program, and never replace the file.
    """
    checked = folder / CHECKED
    began = time.time()
    since = checked.stat().st_mtime if checked.exists() else 0.0
    for program in folder.glob("*-cache"):
        if program.stat().st_mtime >= since and not is_whole(program.read_bytes()):
            program.unlink(missing_ok=True)
    checked.touch()
    os.utime(checked, (began, began))


def is_whole(program: bytes) -> bool:
    """Whether a file of JAX's cache is complete."""
    if program[:4] != ZSTD:
        try:
            zlib.decompress(program)
        except zlib.error:
            return False
        return True
    for name in ("compression.zstd", "zstandard"):  # the former in Python from 3.14 on
        with suppress(ImportError):
            zstd = importlib.import_module(name)
            try:
                zstd.decompress(program)
            except zstd.ZstdError:
                return False
    return True


def prune(folders: list[Path], most: int) -> None:
    """Removes the least recently used programs until the others take at most `most` bytes.

    The first folder stays; the others are removed when they are empty.
    """
    programs = []
    for folder in folders:
        for program in folder.glob("*-cache"):
            with suppress(FileNotFoundError):
                facts = program.stat()
                programs.append((max(facts.st_atime, facts.st_mtime), facts.st_size, program))
    total = sum(size for _, size, _ in programs)
    for _, size, program in sorted(programs):
        if total <= most:
            break
        program.unlink(missing_ok=True)
        total -= size
    for folder in folders[1:]:
        if {file.name for file in folder.iterdir()} <= {CHECKED}:
            (folder / CHECKED).unlink(missing_ok=True)
            folder.rmdir()


@dataclass
class Compilations:
    """Counts of programs that JAX compiled or read from its cache.

    Attributes:
        programs: number of programs.
        cached: number of programs read from the cache on disk.
    """

    programs: int = 0
    cached: int = 0


@contextmanager
def counted() -> Iterator[Compilations]:
    """Counts what JAX compiles within the `with` block, on all threads."""
    compilations = Compilations()

    def compiled(event: str, duration_secs: float, **_: Any) -> None:
        compilations.programs += event == "/jax/core/compile/backend_compile_duration"

    def cached(event: str, **_: Any) -> None:
        compilations.cached += event == "/jax/compilation_cache/cache_hits"

    jax.monitoring.register_event_duration_secs_listener(compiled)
    jax.monitoring.register_event_listener(cached)
    try:
        yield compilations
    finally:
        jax.monitoring.unregister_event_duration_listener(compiled)
        jax.monitoring.unregister_event_listener(cached)
