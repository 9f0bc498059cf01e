"""What compiling costs once: kept on disk from process to process, and counted."""

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
"""File whose age says which programs were looked at."""

ZSTD = b"\x28\xb5\x2f\xfd"
"""How a file begins that JAX compressed by zstandard; else it is by zlib."""


def use_compilation_cache(folder: str | Path | None = None, *, max_size: int | str = "1GiB") -> str | None:
    """Keeps what JAX compiles on disk, for the next process that needs the same programs.

    The `layerscope` command does this by itself. A library may not: the cache is JAX's own setting, for all
    that a process compiles, and an application may have made up its mind. So call this once, before the first
    engine. A cache that is on already (`jax_compilation_cache_dir`, `JAX_COMPILATION_CACHE_DIR`) stays as it
    is, and `JAX_ENABLE_COMPILATION_CACHE=0` keeps all of them off.

    Everything is kept, however quickly it was compiled: a model is many small programs. Each call removes
    what was cut off while it was written, and what was used longest ago until no more than `max_size` is
    left; the folder may be deleted at any time. Whoever can write to it can make this process run what they
    like: do not share it.

    Args:
        folder: made if needed. None for one of this user and kind of CPU: `layerscope_jax` in
            `$XDG_CACHE_HOME` or `~/.cache` (on macOS `~/Library/Caches`, on Windows `%LOCALAPPDATA%`).
        max_size: bytes of programs, 1 GiB by default: those in the folder, or where none is named those for
            all kinds of CPU together. JAX's own bound, if set (`jax_compilation_cache_max_size`), stands
            instead.

    Returns:
        The folder in use; None if caches are switched off.

    Raises:
        ValueError: if JAX keeps a cache in another folder than the one that was asked for, or if `max_size`
            is no size.
        OSError: if the folder cannot be made or written to.
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
        # JAX's own way wants another package, and the time of use of each program beside it, else it fails.
        with suppress(OSError):  # another process is at it too
            others = [] if folder is not None else [one for one in path.parent.iterdir() if one.is_dir()]
            prune([path, *(one for one in others if one != path)], most)
            discard_damaged(path)
    # By default only what took a second to compile is kept: little of a model on a CPU does.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_compilation_cache_dir", str(path))
    return str(path)


def default_folder() -> Path:
    """This user's, for this kind of CPU.

    Programs for a CPU use its own instructions, and JAX does not tell CPUs apart: one home that several
    machines share would hand them programs that they cannot run.
    """
    kind = hashlib.sha256(f"{machine.cpu_name()} {machine.cpu_features()}".encode()).hexdigest()
    return user_cache() / kind[:12]


def discard_damaged(folder: Path) -> None:
    """Removes programs that are not whole, of those that were written since the last time.

    A full disk leaves such, or whoever was killed. JAX reads each anew in every process, warns, compiles the
    program, and never replaces the file.
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
    """Whether a file of JAX's cache can be read."""
    if program[:4] != ZSTD:
        try:
            zlib.decompress(program)
        except zlib.error:
            return False
        return True
    for name in ("compression.zstd", "zstandard"):  # Python's own from 3.14 on
        with suppress(ImportError):
            zstd = importlib.import_module(name)
            try:
                zstd.decompress(program)
            except zstd.ZstdError:
                return False
    return True


def prune(folders: list[Path], most: int) -> None:
    """Removes the programs that were used longest ago, until the rest takes at most so many bytes.

    Of the folders, the first stays; others go when nothing is left in them.
    """
    found = []
    for folder in folders:
        for program in folder.glob("*-cache"):
            with suppress(FileNotFoundError):
                facts = program.stat()
                found.append((max(facts.st_atime, facts.st_mtime), facts.st_size, program))
    total = sum(size for _, size, _ in found)
    for _, size, program in sorted(found):
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
    """Programs that this process did not have before.

    Attributes:
        programs: all of them.
        cached: those that came from the cache on disk.
    """

    programs: int = 0
    cached: int = 0


@contextmanager
def counted() -> Iterator[Compilations]:
    """Counts what JAX compiles meanwhile, on whatever thread."""
    found = Compilations()

    def compiled(event: str, duration_secs: float, **_: Any) -> None:
        found.programs += event == "/jax/core/compile/backend_compile_duration"

    def cached(event: str, **_: Any) -> None:
        found.cached += event == "/jax/compilation_cache/cache_hits"

    jax.monitoring.register_event_duration_secs_listener(compiled)
    jax.monitoring.register_event_listener(cached)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(compiled)
        jax.monitoring.unregister_event_listener(cached)
