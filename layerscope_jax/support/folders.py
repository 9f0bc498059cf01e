"""Writes a folder completely or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from layerscope_jax.support.files import sync


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Gives a temporary folder beside `folder`, which gets its name once the `with` block ends.

    By then everything in it is on disk. A failure or an interrupt removes the temporary folder; a kill leaves
    it behind, under a name that begins with a dot and ends in ".tmp".

    Args:
        folder: must not exist; the folders that it lies in are made if needed.

    Raises:
        ValueError: if it exists, or cannot be written.
    """
    if os.path.lexists(folder):
        raise ValueError(f"{folder}: expected a folder that does not exist yet; remove it or name another")
    new = folder.with_name(f".{folder.name[:40]}.{secrets.token_hex(6)}.tmp")
    try:
        new.mkdir(parents=True)
        yield new
        for place, _, files in os.walk(new, topdown=False):
            for name in (*files, "."):
                sync(Path(place, name))
        if os.path.lexists(folder):  # `rename` would replace an empty folder
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder))
        os.rename(new, folder)
        sync(folder.parent)
    except OSError as error:
        raise ValueError(f"cannot write {folder}: {error}; choose another folder or make room") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
