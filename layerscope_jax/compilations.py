"""What compiling costs once: kept on disk from process to process, and counted."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from layerscope_jax import machine


def use_compilation_cache(folder: str | Path | None = None) -> str | None:
    """Keeps what JAX compiles on disk, for the next process that needs the same programs.

    The `layerscope` command does this by itself. A library may not: the cache is JAX's own setting, for all
    that a process compiles, and an application may have made up its mind. So call this once, before the first
    engine. A cache that is on already (`jax_compilation_cache_dir`, `JAX_COMPILATION_CACHE_DIR`) stays as it
    is, and `JAX_ENABLE_COMPILATION_CACHE=0` keeps all of them off.

    Everything is kept, however quickly it was compiled: a model is many small programs. Nothing is ever
    removed; the folder may be deleted at any time. Whoever can write to it can make this process run what
    they like: do not share it.

    Args:
        folder: made if needed. None for one of this user and kind of CPU: `layerscope_jax` in
            `$XDG_CACHE_HOME` or `~/.cache` (on macOS `~/Library/Caches`, on Windows `%LOCALAPPDATA%`).

    Returns:
        The folder in use; None if caches are switched off.

    Raises:
        ValueError: if JAX keeps a cache in another folder than the one that was asked for.
        OSError: if the folder cannot be made or written to.
    """
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
    # By default only what took a second to compile is kept: little of a model on a CPU does.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_compilation_cache_dir", str(path))
    return str(path)


def default_folder() -> Path:
    """This user's, for this kind of CPU.

    Programs for a CPU use its own instructions, and JAX does not tell CPUs apart: one home that several
    machines share would hand them programs that they cannot run.
    """
    home = Path.home()
    if sys.platform == "darwin":
        base = home / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    else:
        named = os.environ.get("XDG_CACHE_HOME", "")
        base = Path(named) if os.path.isabs(named) else home / ".cache"  # as its specification says
    kind = hashlib.sha256(f"{machine.cpu_name()} {machine.cpu_features()}".encode()).hexdigest()
    return base / "layerscope_jax" / kind[:12]


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
