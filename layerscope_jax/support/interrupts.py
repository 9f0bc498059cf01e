"""Handles Ctrl-C in a command: ends it at a safe point, or after two seconds in any case.

A handler that raises does so wherever Python happens to be: in a callback of a compiled program or in a
destructor the exception is printed and lost, and during an import it becomes a traceback. So the handler only
records the signal, and long loops call `check` at points where they can end. If the main thread does not
reach such a point, because it compiles or waits, a thread that the signal wakes ends the process. Files that
can be continued then hold whole lines, and at worst the beginning of one, which the next run cuts off. A
second Ctrl-C ends it at once.

This applies only to commands run as a process (`support.entry`). In a program that uses the library, `check`
does nothing, and the program's own handler stays in place.
"""

from __future__ import annotations

import _thread  # `threading` takes longer to import, and the handler should be installed before
import atexit
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket

PATIENCE_S = 1.5
"""Time (s) that the main thread has to end by itself."""

INTERRUPTED = 130  # exit code, as of shells
PLAIN = "interrupted"
FRESH = "\x1b[?25h\n"  # on a terminal: the cursor that a bar hid, and a line of its own

_noted = False
_busy = False  # whether the command has begun its work, which could be left unfinished
_line = PLAIN
_told = False
_telling = _thread.allocate_lock()


def check() -> None:
    """Ends the command if it was interrupted.

    Raises:
        KeyboardInterrupt: after a Ctrl-C.
    """
    if _noted:
        raise KeyboardInterrupt


def promise(line: str) -> None:
    """Sets the line that an interruption prints, such as how to continue."""
    global _line
    _line = line


@contextmanager
def instead(call: Callable[[], object]) -> Iterator[None]:
    """Within the `with` block Ctrl-C calls `call`, in the main thread, and does not end the command."""
    before = signal.getsignal(signal.SIGINT)
    if before in (signal.SIG_IGN, None):
        yield
        return
    woken = signal.set_wakeup_fd(-1)  # so that `_watch` does not count it
    signal.signal(signal.SIGINT, lambda *_: call())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        signal.set_wakeup_fd(woken, warn_on_full_buffer=False)


def install() -> None:
    """Takes over Ctrl-C in this process, unless it is ignored, as in a shell's background jobs."""
    if signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, None):
        return
    signal.signal(signal.SIGINT, _note)  # before the imports below, which take a while too
    # The function registered first is called last; after it, Python stops handling signals and soon ends.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    import socket
    import threading

    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    threading.Thread(target=_watch, args=(ours,), name="interrupts", daemon=True).start()
    # The signal writes to this socket even while the main thread is outside of Python.
    signal.set_wakeup_fd(theirs.detach(), warn_on_full_buffer=False)
    if _noted:  # before the socket existed
        leave()


def begin() -> None:
    """Marks the start of the command's work; before it, during imports, Ctrl-C ends the process at once."""
    global _busy
    _busy = True


def close() -> None:
    """Marks the end of the command's work; then Ctrl-C, even an earlier one, ends the process at once."""
    global _busy
    _busy = False
    if _noted:
        leave()


def tell() -> None:
    """Prints once on stderr that the command was interrupted; returns after it was printed."""
    global _told
    with _telling:
        if not _told:
            _say()
        _told = True


def _say() -> None:
    with suppress(OSError, ValueError, AttributeError):  # no stderr
        try:
            number = sys.stderr.fileno()
        except OSError:  # stderr is kept in memory and has no descriptor
            print(_line, file=sys.stderr)
        else:
            fresh = FRESH if os.isatty(number) else ""
            if _takes(number):
                # Bypasses Python's buffer, which another thread may be using.
                os.write(number, f"{fresh}{_line}\n".encode(errors="backslashreplace"))


def leave() -> None:
    """Ends the process at once, whatever its threads are doing."""
    tell()
    os._exit(INTERRUPTED)


def _takes(number: int) -> bool:
    """Whether a line can be written to a descriptor without waiting for its reader."""
    import select

    try:
        return bool(select.select([], [number], [], 0.2)[1])
    except (OSError, ValueError):  # on Windows only sockets can be asked
        return True


def _note(signum: int, frame: object) -> None:
    global _noted
    _noted = True


def _watch(woken: socket.socket) -> None:
    """Ends the process `PATIENCE_S` after the first Ctrl-C, or at the second."""
    came = 0
    while came < (2 if _busy else 1):
        woken.settimeout(PATIENCE_S if came else None)
        try:
            signals = woken.recv(64)
        except TimeoutError:
            break
        came += signals.count(signal.SIGINT)
    leave()
