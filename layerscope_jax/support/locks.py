"""Locks of files and folders that one run at a time may write to: a second run is told which run that is.

The lock is the operating system's, on a file of its own beside the place: one that a killed run left there
holds nobody up. It keeps out runs on this machine; on a network file system perhaps not those of others.
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

    def _try_lock(number: int) -> None:
        os.lseek(number, FAR, os.SEEK_SET)
        msvcrt.locking(number, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]

else:

    def _try_lock(number: int) -> None:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)


FAR = 1 << 30
"""Where Windows locks a byte, which nobody could read then: behind all that is in the file."""


@contextmanager
def locked(place: Path) -> Iterator[None]:
    """Holds the lock of a file or a folder, so that no other run writes there.

    The lock is `FILE.lock`, or `.lock` in a folder, and is removed in the end.

    Args:
        place: a file, which need not exist yet, or an existing folder. Anything else, such as a device, gets
            no lock.

    Raises:
        ValueError: if another run has it, saying which; or if the lock cannot be made.
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
        # While it is still held, so that nobody's but this run's is removed.
        with suppress(OSError):  # Windows removes no open file
            path.unlink()
        os.close(number)


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder, as `locked` does; makes the folder if needed."""
    with made(folder), locked(folder):
        yield


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """Makes a folder if it does not exist; removes it at the end if it was made here and is empty.

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
            with suppress(OSError):  # it holds something
                folder.rmdir()


def _taken(path: Path, place: Path) -> int:
    """Opens the lock file at `path` and locks it for this run."""
    while True:
        try:
            number = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ValueError(
                f"cannot write to {path}: {error.strerror}; choose a place in a folder that is there and "
                "yours"
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
        os.close(number)  # its run has just removed it: try again


def _is_free(number: int, place: Path) -> bool:
    try:
        _try_lock(number)
    except (BlockingIOError, PermissionError):  # the latter on Windows
        raise ValueError(
            f"{place} is being written by another run{_holder(number)}; wait until it has ended, or choose "
            "another place"
        ) from None
    except OSError:  # a file system that has no locks: then nobody can be kept out
        pass
    return True


def _is_at(number: int, path: Path) -> bool:
    """Whether the open file still has that name: the run that held it before may have removed it."""
    try:
        return os.path.samestat(os.fstat(number), path.stat())
    except FileNotFoundError:
        return False


def _self() -> dict[str, Any]:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": since}


def _holder(number: int) -> str:
    """The run that holds the lock, as the lock file names it; empty if it cannot be read."""
    try:
        os.lseek(number, 0, os.SEEK_SET)
        holder = json.loads(os.read(number, 4096))
        return f" (process {holder['pid']} on {holder['host']}, since {holder['since']})"
    except (OSError, ValueError, KeyError, TypeError):  # it is just being written
        return ""
