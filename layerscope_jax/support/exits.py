"""Exit codes of commands, and the line on stderr that says what went wrong."""

from __future__ import annotations

import dis
import errno
import io
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

from layerscope_jax.support import interrupts
from layerscope_jax.support.errors import LostWorkers, TransferError
from layerscope_jax.support.plugins import LOADED

DONE, FAILED, REFUSED = 0, 1, 2
EXIT_CODES = (
    "Exit codes: 0 done; 1 out of memory or disk space, a device that does not work, a closed output pipe, "
    "or a prompt that ended with an error (demo: also different tokens; fit: the model does not fit; "
    "doctor: something is broken), or a bug in layerscope, whose traceback --debug shows; "
    "2 bad input, with what to change; 130 interrupted."
)

OURS = ("layerscope_jax", "predictor", "tools")
OUTPUT = "standard output"
MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENFILE, errno.EMFILE, errno.ENOMEM, errno.EPIPE)
"""Error numbers of the machine's own failures, which a different file name would not avoid."""


def run(command: Callable[[list[str]], int | None], args: Sequence[str] | None = None) -> int:
    """Calls a command with its arguments and returns its exit code (None counts as 0).

    An exception becomes one line on stderr. The argument `--debug`, anywhere, adds the traceback and is not
    passed on.

    Args:
        command: called with the arguments.
        args: the arguments; None for those of the process.
    """
    args = list(sys.argv[1:] if args is None else args)
    debug, rest = "--debug" in args, [arg for arg in args if arg != "--debug"]
    interrupts.promise(interrupts.PLAIN)
    with _output():
        try:
            code = _outcome(lambda: command(rest), debug)
        except SystemExit:  # after --help, or for a command line that cannot be parsed
            if lost := _outcome(_flush, debug):
                return lost
            raise
        return code or _outcome(_flush, debug)


def end(command: Callable[[list[str]], object], args: Sequence[str] | None = None) -> None:
    """Calls a command as `run` does, for a module's `main` that returns nothing.

    Raises:
        SystemExit: with the exit code, if something went wrong.
    """

    def call(rest: list[str]) -> None:
        command(rest)

    if code := run(call, args):
        raise SystemExit(code)


def say(text: str) -> None:
    """Prints to stderr, if there is one."""
    if sys.stderr is not None:
        print(text, file=sys.stderr)


def need_output() -> None:
    """Refuses to start a command if its output could not be written.

    Raises:
        OSError: if the standard output is closed.
    """
    if isinstance(sys.stdout, _Closed):
        sys.stdout.write("")


def is_deliberate(error: BaseException) -> bool:
    """Whether layerscope or a plugin raised the error with `raise`; if not, a library raised it."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    if place is None or _package(place) not in (*OURS, *LOADED):
        return False
    return dis.opname[place.tb_frame.f_code.co_code[place.tb_lasti]] == "RAISE_VARARGS"


def culprit(error: BaseException) -> str:
    """Returns the package at fault: that of the innermost frame of layerscope or of a plugin."""
    name, place = "layerscope", error.__traceback__
    while place is not None:
        package = _package(place)
        name = "layerscope" if package in OURS else LOADED.get(package, name)
        place = place.tb_next
    return name


def _package(place: TracebackType) -> str:
    """Returns the top-level module of a traceback's frame."""
    return place.tb_frame.f_globals.get("__name__", "").partition(".")[0]


def code_of(error: Exception) -> int:
    """Returns the exit code of an error: 2 for bad input, 1 for anything else."""
    if isinstance(error, OSError):
        return FAILED if error.filename in (None, OUTPUT) or error.errno in MACHINE else REFUSED
    return REFUSED if isinstance(error, ValueError) and is_deliberate(error) else FAILED


def is_fault(error: Exception) -> bool:
    """Whether an error is a bug of this package or a plugin, not bad input or a failure of the machine."""
    if isinstance(error, (OSError, MemoryError, TransferError, LostWorkers)) or code_of(error) == REFUSED:
        return False
    jax_says = ("RESOURCE_EXHAUSTED", "Unable to initialize backend")
    return not (isinstance(error, RuntimeError) and any(sign in str(error) for sign in jax_says))


def described(error: Exception) -> str:
    """Returns an error's message, without an OSError's number; if memory ran out, with what to change."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    what = str(error).partition("\n")[0] if isinstance(error, RuntimeError) else str(error)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in what:
        return f"out of memory: {what or 'none is left'}; set a smaller --device-budget or --max-num-seqs"
    return what or type(error).__name__


def _outcome(call: Callable[[], int | None], debug: bool) -> int:
    try:
        return call() or DONE
    except KeyboardInterrupt:
        interrupts.tell()
        return interrupts.INTERRUPTED
    except Exception as error:
        if isinstance(error, OSError) and error.filename == OUTPUT:
            _give_output_up()
        if isinstance(error, BrokenPipeError):  # the reader of the output has gone: print nothing
            return FAILED
        return _explain(error, debug)


def _explain(error: Exception, debug: bool) -> int:
    if debug and sys.stderr is not None:
        traceback.print_exception(error)
    text = described(error)
    if is_fault(error):
        advice = "report it with the lines above" if debug else "run again with --debug and report it"
        name = type(error).__name__
        what = name if text == name else f"{name}: {text}"
        text = f"this is a bug in {culprit(error)}, not in your input: {what}; {advice}"
    say("error: " + " ".join(text.split()))
    return code_of(error)


def _flush() -> None:
    sys.stdout.flush()


def _give_output_up() -> None:
    """Discards output that is still buffered, which Python would otherwise try to write at exit."""
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


@contextmanager
def _output() -> Iterator[None]:
    """Makes the standard output accept any character, and be named in its errors."""
    before = sys.stdout
    if before is None:
        sys.stdout = _Closed()
    elif isinstance(before, io.TextIOWrapper):
        errors = "backslashreplace"  # a character that the terminal lacks must not end a run
        buffer: Any = before.buffer  # the file itself, where Python does not buffer
        if isinstance(getattr(buffer, "raw", buffer), io.FileIO):
            before.flush()
            named = _Named(before.fileno(), "w", closefd=False)
            sys.stdout = io.TextIOWrapper(
                named if isinstance(buffer, io.FileIO) else io.BufferedWriter(named),  # type: ignore[arg-type]
                encoding=before.encoding,
                errors=errors,
                line_buffering=before.line_buffering,
                write_through=before.write_through,
            )
        else:
            before.reconfigure(errors=errors)
    try:
        yield
    finally:
        sys.stdout = before


class _Named(io.FileIO):
    """Standard output whose errors name it."""

    def write(self, data: Any) -> Any:
        try:
            return super().write(data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, OUTPUT) from None


class _Closed(io.TextIOBase):
    """Stands in for a closed standard output."""

    encoding = "utf-8"

    @property
    def buffer(self) -> _Closed:
        return self

    def write(self, text: object) -> int:
        raise OSError(errno.EBADF, "it is closed, and there is something to print", OUTPUT)
