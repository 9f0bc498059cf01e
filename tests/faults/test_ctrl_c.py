"""Ctrl-C at moments that are forced: in C, in callbacks, in imports, when all is done."""

import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import TINY, not_ignored, random_model

from layerscope_jax import Engine, OffloadConfig
from layerscope_jax.runtime.whole import WholeModel
from layerscope_jax.support import interrupts

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="sends signals as POSIX has them"),
    pytest.mark.usefixtures("quick_compiles"),
]

BEGIN = """
import os, signal, sys, time
from layerscope_jax.support import exits, interrupts

def press():
    os.kill(os.getpid(), signal.SIGINT)

interrupts.install()
interrupts.begin()
"""

IN_C = "import hashlib; os.write(1, b'there\\n'); hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"
"""Hours, without a look at signals."""


def started(program, env=None, **settings):
    """A process of a program, in which Ctrl-C is not ignored, whoever runs the tests."""
    with not_ignored(signal.SIGINT):
        return subprocess.Popen(
            [sys.executable, *(["-c", program] if isinstance(program, str) else program)],
            stdout=subprocess.PIPE,
            stderr=settings.pop("stderr", subprocess.PIPE),
            text=True,
            env={**os.environ, "PYTHONPATH": os.getcwd(), **(env or {})},
            **settings,
        )


def ended(process):
    """Its exit code and stderr."""
    _, said = process.communicate(timeout=60)
    return process.returncode, said


def test_while_the_main_thread_is_in_c():
    process = started(BEGIN + IN_C)
    assert process.stdout.readline() == "there\n"
    process.send_signal(signal.SIGINT)
    assert ended(process) == (130, "interrupted\n")


def test_a_second_one_ends_at_once():
    process = started(BEGIN + "interrupts.PATIENCE_S = 10**6\n" + IN_C)
    assert process.stdout.readline() == "there\n"
    process.send_signal(signal.SIGINT)
    # The first is to be taken before the second comes: the same signal does not wait twice.
    while not pending_is_empty(process.pid):
        pass
    process.send_signal(signal.SIGINT)
    assert ended(process) == (130, "interrupted\n")


def pending_is_empty(pid):
    try:
        with open(f"/proc/{pid}/status") as file:
            status = dict(line.split(":\t", 1) for line in file if line.startswith(("SigPnd", "ShdPnd")))
    except FileNotFoundError:
        time.sleep(0.5)  # no Linux: signals are taken long before
        return True
    return not any(int(mask, 16) & 1 << signal.SIGINT - 1 for mask in status.values())


@pytest.mark.parametrize(
    "place",
    [
        "class Pressed:\n def __del__(self): press()\nPressed()",
        "import weakref\nclass Thing: pass\nthing = Thing()\nweakref.finalize(thing, press)\ndel thing",
        "import gc\ngc.callbacks.append(lambda phase, info: press())\ngc.collect()\ngc.callbacks.clear()",
        "import jax\ncall = lambda x: jax.pure_callback(lambda x: (press(), x)[1], x, x)\n"
        "jax.jit(call)(1.0).block_until_ready()",
    ],
    ids=["destructor", "finalizer", "collector", "jax"],
)
def test_in_a_callback_it_is_not_lost(place):
    program = f"{BEGIN}{place}\nassert interrupts._noted\n"
    program += "sys.exit(exits.run(lambda args: interrupts.check()))"
    assert ended(started(program)) == (130, "interrupted\n")


def test_during_the_imports(tmp_path):
    (tmp_path / "tyro.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(600)\n"
    )
    process = started(
        ["-m", "layerscope_jax.cli", "generate"], {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.getcwd()}"}
    )
    assert ended(process) == (130, "interrupted\n")


@pytest.mark.parametrize("end", ["atexit.register", "threading._register_atexit", "later"])
def test_when_the_command_is_done(tmp_path, end):
    (tmp_path / "done.py").write_text(
        "import atexit, os, signal, threading, time\n"
        "def press():\n os.kill(os.getpid(), signal.SIGINT); time.sleep(600)\n"
        "def later(press):\n"
        " def wait():\n  threading.main_thread().join(); press()\n"
        " threading.Thread(target=wait).start()\n"
        f"def main():\n print('done'); {end}(press)\n"
    )
    program = "from layerscope_jax.support.entry import run; run('done')"
    process = started(program, {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.getcwd()}"})
    assert ended(process) == (130, "interrupted\n")


def test_what_could_be_said_when_nobody_reads():
    program = BEGIN + "os.set_blocking(2, False)\ntry:\n while True: os.write(2, b'x' * 4096)\n"
    process = started(program + "except BlockingIOError: os.set_blocking(2, True)\n" + IN_C)
    assert process.stdout.readline() == "there\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    process.stdout.close()
    process.stderr.close()


def test_the_cursor_comes_back():
    import pty

    ours, theirs = pty.openpty()
    bar = "from rich.progress import Progress\nfrom rich.console import Console\n"
    bar += "with Progress(console=Console(stderr=True)) as bar:\n bar.add_task('x')\n bar.refresh()\n "
    process = started(BEGIN + bar + IN_C, {"TERM": "xterm"}, stderr=theirs)
    os.close(theirs)
    assert process.stdout.readline() == "there\n"
    process.send_signal(signal.SIGINT)
    said = b""
    try:
        while block := os.read(ours, 4096):
            said += block
    except OSError:  # Linux ends a terminal so
        pass
    assert process.wait(timeout=60) == 130
    assert b"\x1b[?25l" in said  # it was hidden
    assert said.rpartition(b"\x1b[?25l")[2].endswith(b"\x1b[?25h\r\ninterrupted\r\n")
    process.stdout.close()
    os.close(ours)


def test_what_is_ignored_stays_ignored():
    program = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + BEGIN + "press(); print(1)"
    process = started(program)
    assert process.communicate(timeout=60) == ("1\n", "")


def test_a_library_leaves_the_handler_alone():
    program = "import signal; was = signal.getsignal(signal.SIGINT)\nimport layerscope_jax as ls\nls.Engine\n"
    program += "from layerscope_jax.cli import main as cli\nfrom layerscope_jax.support import interrupts\n"
    program += "assert cli.main(['--version']) == 0\n"
    program += "assert signal.getsignal(signal.SIGINT) is was; interrupts.check(); print('same')"
    out, said = started(program).communicate(timeout=60)
    assert (out.splitlines()[-1], said) == ("same", "")


@pytest.mark.parametrize(("numerics", "whole"), [("fast", False), ("fast", True), ("auto", False)])
def test_no_step_begins(numerics, whole, monkeypatch):
    """Whatever runs it."""
    monkeypatch.setattr(WholeModel, "is_faster_on", lambda device: whole)
    with Engine(random_model(TINY), OffloadConfig(numerics=numerics)) as engine:
        stream = engine.stream([[1]], max_new_tokens=3)
        monkeypatch.setattr(interrupts, "_noted", True)
        with pytest.raises(KeyboardInterrupt):
            next(stream)


def test_the_next_layer_does_not_begin(monkeypatch):
    with Engine(random_model(TINY), OffloadConfig(numerics="auto")) as engine:
        layers = []

        def pressed(layer, *_):
            layers.append(layer)
            monkeypatch.setattr(interrupts, "_noted", layer == 1)

        engine.runner.tap = pressed
        with pytest.raises(KeyboardInterrupt):
            next(engine.stream([[1]], max_new_tokens=3))
        assert layers == [0, 1]
