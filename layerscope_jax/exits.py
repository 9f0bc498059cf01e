"""How commands end: an exit code, and one line on stderr for whatever went wrong."""

from __future__ import annotations

import dis
import errno
import io
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from layerscope_jax import interrupts

DONE, FAILED, REFUSED, FAULT = 0, 1, 2, 70
EXIT_CODES = (
    "Exit codes: 0 done; 1 not done, for lack of memory, disk space or a working device, or because nobody "
    "reads the output any more (of demo also: other tokens came out); 2 refused, with what to change; 70 a "
    "fault of layerscope, which --debug shows; 130 interrupted."
)

OURS = ("layerscope_jax", "predictor")
OUTPUT = "standard output"


def run(command: Callable[[list[str]], int | None], args: Sequence[str] | None = None) -> int:
    """Calls a command with its arguments and returns its exit code (None counts as 0).

    What it raises becomes one line on stderr; an argument `--debug`, wherever it stands, asks for the
    traceback too, and is not passed on.

    Args:
        command: is given the arguments.
        args: those of the process if None.
    """
    args = list(sys.argv[1:] if args is None else args)
    debug, rest = "--debug" in args, [arg for arg in args if arg != "--debug"]
    interrupts.promise(interrupts.PLAIN)
    with _output():
        try:
            code = _outcome(lambda: command(rest), debug)
        except SystemExit:  # help was asked for, or the command line cannot be read
            if lost := _outcome(_flush, debug):
                return lost
            raise
        return code or _outcome(_flush, debug)


def end(command: Callable[[list[str]], object], args: Sequence[str] | None = None) -> None:
    """As `run`, for a module's `main` that returns nothing.

    Raises:
        SystemExit: if something went wrong, with the exit code.
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
    """Refuses to begin what nobody could be told of.

    Raises:
        OSError: if the standard output is closed.
    """
    if isinstance(sys.stdout, _Closed):
        sys.stdout.write("")


def is_deliberate(error: BaseException) -> bool:
    """Whether code of ours raised it, with `raise`, to say something; else it came up from beneath."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    if place is None or place.tb_frame.f_globals.get("__name__", "").partition(".")[0] not in OURS:
        return False
    return dis.opname[place.tb_frame.f_code.co_code[place.tb_lasti]] == "RAISE_VARARGS"


def code_of(error: Exception) -> int:
    """Whose matter it is: of who gave the input, of the machine, or a fault of ours."""
    if isinstance(error, OSError):
        theirs = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
        return REFUSED if isinstance(error, theirs) else FAILED
    if isinstance(error, ValueError) and is_deliberate(error):
        return REFUSED
    if isinstance(error, MemoryError):
        return FAILED
    transfers = sys.modules.get("layerscope_jax.experts.transfers")  # not imported for this alone
    if transfers is not None and isinstance(error, transfers.TransferError):
        return FAILED
    jax_says = ("RESOURCE_EXHAUSTED", "Unable to initialize backend")
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in jax_says):
        return FAILED
    return FAULT


def described(error: Exception) -> str:
    """What went wrong, without the number that OSError puts before it; for lack of memory, what to change."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    what = str(error).partition("\n")[0] if isinstance(error, RuntimeError) else str(error)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in what:
        return f"out of memory: {what or 'none is left'}; give a smaller --device-budget or --batch-size"
    return what or type(error).__name__


def _outcome(call: Callable[[], int | None], debug: bool) -> int:
    try:
        return call() or DONE
    except KeyboardInterrupt:
        interrupts.tell()
        return interrupts.INTERRUPTED
    except OSError as error:
        found = error
        if error.filename is None:
            try:
                _flush()
            except OSError as stuck:
                found = stuck
        return FAILED if isinstance(found, BrokenPipeError) else _explain(found, debug)
    except Exception as error:
        return _explain(error, debug)


def _explain(error: Exception, debug: bool) -> int:
    if debug and sys.stderr is not None:
        traceback.print_exception(error)
    code, text = code_of(error), described(error)
    if code == FAULT:
        advice = "report it with the lines above" if debug else "run again with --debug and report it"
        name = type(error).__name__
        what = name if text == name else f"{name}: {text}"
        text = f"this is a fault of layerscope, not of your input: {what}; {advice}"
    say("error: " + " ".join(text.split()))
    return code


def _flush() -> None:
    """Writes what was printed.

    Raises:
        OSError: naming the standard output. What could not be written is dropped: Python would try again in
            the end.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OSError(error.errno, error.strerror, OUTPUT) from None


@contextmanager
def _output() -> Iterator[None]:
    """Makes the standard output take any letter, and refuse in words where there is none."""
    before = sys.stdout
    if isinstance(before, io.TextIOWrapper):  # no letter that a terminal lacks may end a run
        before.reconfigure(errors="backslashreplace")
    if before is None:
        sys.stdout = _Closed()
    try:
        yield
    finally:
        sys.stdout = before


class _Closed(io.TextIOBase):
    """Stands for a standard output that is not there."""

    encoding = "utf-8"

    @property
    def buffer(self) -> _Closed:
        return self

    def write(self, text: object) -> int:
        raise OSError(errno.EBADF, "it is closed, and there is something to print", OUTPUT)
