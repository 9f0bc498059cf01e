"""One process at a time compiles a function; others that need it wait, and then read what was kept."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from layerscope_jax.support.locks import try_lock

WAIT_S = 120.0
"""Time (s) after which a process compiles for itself: the other one may have been stopped."""

LOOK_S = 0.02
"""Time (s) between two looks at a lock."""


class Turns:
    """The functions that this process compiles, each kept from others by a lock beside its file."""

    def __init__(self) -> None:
        self._held: dict[Path, int] = {}  # locks, and their descriptors

    def take(self, file: Path) -> bool:
        """Waits while another process makes a file, then lets the others wait for this one.

        Without a lock (in a folder that cannot be written to, or a file system that has none) nobody waits.

        Args:
            file: what will be kept, in a folder that exists.

        Returns:
            whether it had to wait, so that the file may be there by now.
        """
        lock = lock_of(file)
        if lock in self._held:  # this process began before, and failed
            return False
        try:
            number = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError:
            return False
        waited, until = False, time.monotonic() + WAIT_S
        try:
            while time.monotonic() < until:
                try:
                    try_lock(number)
                except (BlockingIOError, PermissionError):  # the latter on Windows
                    waited = True
                    time.sleep(LOOK_S)
                    continue
                except OSError:
                    break
                self._held[lock] = number
                break
        finally:
            if lock not in self._held:
                os.close(number)
        return waited

    def end(self, file: Path) -> None:
        """Ends this process's turn at a file, if it has one."""
        lock = lock_of(file)
        number = self._held.pop(lock, None)
        if number is not None:
            with suppress(OSError):  # Windows cannot remove an open file
                lock.unlink()
            os.close(number)


def lock_of(file: Path) -> Path:
    return file.with_name(file.name + ".lock")
