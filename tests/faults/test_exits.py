"""How commands end: whose matter an error is, what --debug shows, and outputs that nobody reads."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from layerscope_jax import TransferError, parse_bytes
from layerscope_jax.support import exits

DISK_FULL = Path("/dev/full")


def raising(error):
    def command(args):
        raise error

    return command


def deliberate():
    try:
        parse_bytes("much", "budget")
    except ValueError as error:
        return error


def test_an_error_of_ours_is_of_the_input(capsys):
    assert exits.run(raising(deliberate()), []) == 2
    out, said = capsys.readouterr()
    assert (out, said.count("\n")) == ("", 1)
    assert said.startswith("error: budget must be a size")


@pytest.mark.parametrize(
    "call",
    [
        lambda: int("x"),  # of C, called from a test: nobody's
        lambda: parse_bytes.__globals__["re"].compile("("),  # of Python's own
        lambda: exits.run.__globals__["dis"].opname["x"],
        lambda: jax.numpy.zeros(2) + jax.numpy.zeros(3),
    ],
    ids=["C", "library", "type", "jax"],
)
def test_what_comes_from_beneath_is_a_fault(call, capsys):
    assert exits.run(lambda args: call(), []) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.match(r"error: this is a bug in layerscope, not in your input: \w+: .*; run again with", said)
    assert "--debug and report it" in said


def test_a_call_in_our_own_code_is_no_refusal():
    """The innermost frame is ours, but it raised nothing."""
    namespace = {"__name__": "layerscope_jax.made_up"}
    exec("def calls(): int('x')\ndef raises(): raise ValueError('x')", namespace)
    found = {}
    for name in ("calls", "raises"):
        try:
            namespace[name]()
        except ValueError as error:
            found[name] = exits.is_deliberate(error)
    assert found == {"calls": False, "raises": True}


@pytest.mark.parametrize("args", [["--debug", "x"], ["x", "--debug"]])
@pytest.mark.parametrize(("make", "code"), [(lambda: KeyError("k"), 1), (deliberate, 2)])
def test_debug_shows_where(args, make, code, capsys):
    seen = []

    def command(rest):
        seen.append(rest)
        raise make()

    assert exits.run(command, args) == code
    assert seen == [["x"]]
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "Traceback (most recent call last):"
    assert said[-1].startswith("error: ")
    assert sum(line.startswith("error: ") for line in said) == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (FileNotFoundError(2, "No such file", "x"), 2),
        (OSError(36, "File name too long", "x"), 2),
        (OSError(28, "No space left on device", "x"), 1),
        (OSError(28, "No space left on device"), 1),
        (MemoryError(), 1),
        (TransferError("copying failed"), 1),
        (RuntimeError("Unable to initialize backend 'cuda'"), 1),
        (RuntimeError("expert 3 was evicted, but is not resident"), 1),
        (AssertionError(), 1),
        (RecursionError("maximum recursion depth exceeded"), 1),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_codes(error, code, capsys):
    assert exits.run(raising(error), []) == code
    said = capsys.readouterr().err
    assert said.count("\n") == 1 or code == 130
    ours = isinstance(error, (AssertionError, RecursionError)) or "evicted" in str(error)
    assert said.startswith("error: this is a bug in layerscope") == ours


def ran(program, redirected, buffered):
    """Exit code and stderr of a program whose streams a shell redirects."""
    command = f'"$0" -c "$1" {redirected}'
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}", sys.executable, program],
        env=os.environ | {"PYTHONPATH": os.getcwd(), "PYTHONUNBUFFERED": "" if buffered else "1"},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stderr


PRINT = "import sys; from layerscope_jax.support import exits\n"
PRINT += "sys.exit(exits.run(lambda args: print('x' * {}), []))"
BYTES = "import sys; from layerscope_jax.support import exits\n"
BYTES += "sys.exit(exits.run(lambda args: sys.stdout.buffer.write(b'x') and None, []))"
HELP = "import sys, tyro; from layerscope_jax.support import exits\n"
HELP += "sys.exit(exits.run(lambda args: tyro.cli(int, args=args), ['--help']))"

pytest_shell = pytest.mark.skipif(os.name != "posix", reason="needs a shell")


@pytest_shell
@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize(
    "program",
    [PRINT.format(1), PRINT.format(10**6), BYTES, HELP],
    ids=["few", "many", "bytes", "help"],
)
@pytest.mark.parametrize(
    ("redirected", "expected"),
    [
        (">&-", "error: standard output: it is closed, and there is something to print\n"),
        (">/dev/full", "error: standard output: No space left on device\n"),
        ("2>/dev/null >/dev/full", ""),
        ("| exec 0<&-", None),
        (">&- 2>&-", ""),
    ],
)
def test_an_output_that_takes_nothing(program, redirected, expected, buffered):
    if "full" in redirected and not DISK_FULL.exists():
        pytest.skip("there is no /dev/full here")
    code, said = ran(program, redirected, buffered)
    if expected is None:  # whoever reads may end before or after: nothing is said in either case
        assert (code in (0, 1, 141), said) == (True, "")
    else:
        assert (code, said) == (1, expected)


@pytest_shell
def test_a_reader_that_has_gone():
    program = "import os, sys; from layerscope_jax.support import exits; sys.stdin.read()\n"
    program += "sys.exit(exits.run(lambda args: print('x'), []))"
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": os.getcwd()},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()  # before it prints: it waits for its input to end
    said = process.communicate()[1]
    assert (process.returncode, said) == (1, b"")


@pytest_shell
def test_nothing_of_ours_comes_to_be_the_closed_output(tmp_path):
    (tmp_path / "made.py").write_text(
        "import os\ndef main():\n os.write(os.open('out.txt', os.O_CREAT | os.O_WRONLY), b'row')\n"
        " os.system('echo noise')\n"
    )
    program = "from layerscope_jax.support.entry import run; run('made')"
    env = os.environ | {"PYTHONPATH": f"{os.getcwd()}{os.pathsep}{tmp_path}"}
    command = ["bash", "-c", '"$0" -c "$1" >&-', sys.executable, program]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.txt").read_text() == "row"
