"""`layerscope generate` is interrupted at several moments, from imports to the last row, and gone on with."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import quick_compiling
from helpers import not_ignored, random_model

from layerscope_jax import save

pytestmark = pytest.mark.skipif(os.name != "posix", reason="sends signals as POSIX has them")

MOMENTS, ROWS = 5, 30
LIMIT_S = 20
"""For a machine that has a lot else to do; it is 2 s on one that has not."""

ALL = """
import json, sys
from layerscope_jax.cli import main as cli
for command in json.loads(sys.argv[1]):
    assert cli.main(command) == 0
"""


class Runs:
    """Starts `layerscope generate` for a few prompts, all compiled programs of which are in a cache.

    Attributes:
        whole: what a run writes that nobody interrupts.
        seconds: that it takes.
    """

    def __init__(self, folder):
        self.folder = folder
        self.prompts, self.checkpoint = folder / "prompts.jsonl", folder / "checkpoint"
        save(random_model(num_layers=2, qk_norm="all"), self.checkpoint)
        rows = [{"prompt": [number, 5, 7], "stop_token_ids": []} for number in range(ROWS)]
        self.prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.env = os.environ | {
            "PYTHONPATH": os.getcwd(),
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            **quick_compiling.ENVIRONMENT,
        }
        for name in ("first", "second"):  # the first compiles
            began = time.perf_counter()
            process = self.start(name)
            said = process.communicate(timeout=600)[1]
            assert process.returncode == 0, said
            self.seconds = time.perf_counter() - began
        self.whole = self.content("second")
        assert self.whole.count(b"\n") == ROWS
        assert self.content("first") == self.whole

    def command(self, name):
        files = [f"--prompts={self.prompts}", f"--out={self.folder / name}"]
        return ["generate", str(self.checkpoint), *files, "--max-new-tokens=60", "--max-num-seqs=1"]

    def content(self, name):
        file = self.folder / name
        return file.read_bytes() if file.exists() else b""

    def start(self, name):
        return subprocess.Popen(
            [sys.executable, "-m", "layerscope_jax.cli", *self.command(name)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=self.env,
        )

    def signalled(self, name, moment, *signals):
        """A run that gets signals after part of its time: exit code, stderr, and the seconds it then took."""
        process = self.start(name)
        until_it_listens(process)
        time.sleep(moment * self.seconds)
        began = time.perf_counter()
        for number in signals:
            process.send_signal(number)
        said = process.communicate(timeout=600)[1]
        return process.returncode, said, time.perf_counter() - began

    def is_a_beginning(self, content):
        """Whether it is whole rows of the right ones and, at most, a piece of the next."""
        return self.whole.startswith(content)

    def go_on(self, contents):
        """What each of some files is after the command was run again; one process does them all."""
        commands = []
        for number, content in enumerate(contents):
            (self.folder / f"again{number}").write_bytes(content)
            commands.append(self.command(f"again{number}"))
        subprocess.run([sys.executable, "-c", ALL, json.dumps(commands)], env=self.env, check=True)
        return [self.content(f"again{number}") for number in range(len(contents))]


def until_it_listens(process):
    """Until it has a thread beside the first: until then it is Python alone that is starting."""
    try:
        while process.poll() is None:
            with open(f"/proc/{process.pid}/status") as file:
                threads = next(line for line in file if line.startswith("Threads:"))
            if int(threads.split()[1]) > 1:
                return
            time.sleep(0.002)
    except (FileNotFoundError, StopIteration):
        time.sleep(0.3)


@pytest.fixture(autouse=True)
def heard():
    """Ctrl-C is not ignored in what is started, whoever runs the tests."""
    with not_ignored(signal.SIGINT):
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"))


def test_several_moments(runs):
    def interrupted(number):
        return runs.signalled(f"out{number}", number / MOMENTS, signal.SIGINT)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(interrupted, range(MOMENTS)))
    took = []
    for number, (code, said, seconds) in enumerate(found):
        content = runs.content(f"out{number}")
        assert runs.is_a_beginning(content), (number, content)
        if code == 0:  # it was done already, and nothing else may be
            assert content == runs.whole
            continue
        took.append(seconds)
        assert code == 130, (number, said)
        *before, last = said.splitlines()
        assert last.startswith("interrupted"), (number, said)
        assert not before or content == runs.whole, (number, said)  # then it is what a whole run says
    print(f"{len(took)} runs of {runs.seconds:.1f} s ended after", [round(one, 2) for one in sorted(took)])
    assert len(took) > MOMENTS // 2
    assert max(took) < LIMIT_S
    states = sorted({runs.content(f"out{number}") for number in range(MOMENTS)} | {runs.whole[:-9]})
    assert runs.go_on(states) == [runs.whole] * len(states)


@pytest.mark.parametrize(
    ("signals", "code"),
    [
        ((signal.SIGINT, signal.SIGINT), 130),
        ((signal.SIGTERM,), -signal.SIGTERM),
    ],
    ids=["twice", "terminate"],
)
def test_it_ends_at_once(runs, signals, code, request):
    name = request.node.callspec.id
    found, said, _ = runs.signalled(name, 0.8, *signals)
    assert found in (code, 0)
    assert "Traceback" not in said
    # It may have said all that a whole run says before.
    assert said.count("\n") <= 1 or runs.content(name) == runs.whole
    assert runs.is_a_beginning(runs.content(name))
