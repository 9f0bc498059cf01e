"""Lets one run at a time write to a file or folder; a second run is told which run holds it.

It is a lock of the operating system on a separate lock file, so a lock file that a killed run left behind
locks nothing. It keeps out other runs on this machine; on a network file system, perhaps not runs on other
machines.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    def try_lock(number: int) -> None:
        os.lseek(number, FAR, os.SEEK_SET)
        msvcrt.locking(number, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]

else:

    def try_lock(number: int) -> None:
        """Locks an open file, or raises a `BlockingIOError` if another process has; others without locks."""
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)


FAR = 1 << 30
"""Offset of the byte that Windows locks: behind the file's content, since a locked byte cannot be read."""


@contextmanager
def locked(place: Path) -> Iterator[None]:
    """Keeps other runs away from a file or a folder within the `with` block.

    The lock is `FILE.lock`, or `.lock` in a folder, and is removed at the end.

    Args:
        place: a file, which need not exist yet, or an existing folder. Other kinds, such as devices, are not
            locked.

    Raises:
        ValueError: if another run holds the lock, naming it; or if the lock file cannot be made.
    """
    place = place.resolve()
    if place.exists() and not place.is_file() and not place.is_dir():
        yield
        return
    path = place / ".lock" if place.is_dir() else place.with_name(place.name + ".lock")
    number = _taken(path, place)
    try:
        yield
    finally:
        # Removed while it is held, so that no other run's lock is.
        with suppress(OSError):  # Windows cannot remove an open file
            path.unlink()
        os.close(number)


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Keeps other runs away from a folder, which is created if needed."""
    with made(folder), locked(folder):
        yield


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """Makes a folder within the `with` block if it does not exist; removes it again if it stays empty.

    Raises:
        ValueError: if it cannot be made.
    """
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror}; choose another folder") from None
    try:
        yield
    finally:
        if new:
            with suppress(OSError):  # not empty
                folder.rmdir()


def _taken(path: Path, place: Path) -> int:
    """Opens and locks the lock file at `path`; returns its descriptor."""
    while True:
        try:
            number = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ValueError(
                f"cannot write to {path}: {error.strerror}; choose a place in a folder that exists and "
                "that you may write to"
            ) from None
        try:
            if _is_free(number, place) and _is_at(number, path):
                os.ftruncate(number, 0)
                os.lseek(number, 0, os.SEEK_SET)
                os.write(number, json.dumps(_self()).encode())
                return number
        except BaseException:
            os.close(number)
            raise
        os.close(number)  # the run that held it has just removed it: try again


def _is_free(number: int, place: Path) -> bool:
    try:
        try_lock(number)
    except (BlockingIOError, PermissionError):  # the latter on Windows
        raise ValueError(
            f"{place} is being written by another run{_holder(number)}; wait until it has ended, or choose "
            "another place"
        ) from None
    except OSError:  # a file system without locks keeps nobody out
        pass
    return True


def _is_at(number: int, path: Path) -> bool:
    """Whether the open file still has that name; the run that held it before may have removed it."""
    try:
        return os.path.samestat(os.fstat(number), path.stat())
    except FileNotFoundError:
        return False


def _self() -> dict[str, Any]:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": since}


def _holder(number: int) -> str:
    """Returns the run that the lock file names, in parentheses; empty if it names none."""
    try:
        os.lseek(number, 0, os.SEEK_SET)
        holder = json.loads(os.read(number, 4096))
        return f" (process {holder['pid']} on {holder['host']}, since {holder['since']})"
    except (OSError, ValueError, KeyError, TypeError):  # it is being written right now
        return ""
