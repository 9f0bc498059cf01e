"""`layerscope generate` is interrupted at several moments, from imports to the last row, and gone on with."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import quick_compiling
from helpers import not_ignored, random_model

from layerscope_jax import save
from layerscope_jax.cli import main as cli

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="sends signals as POSIX has them"),
    pytest.mark.usefixtures("quick_compiles"),
]

ROWS = 16
LIMIT_S = 20
"""For a machine that has a lot else to do; it is 2 s on one that has not."""


def has_loaded_jax(process, file):
    try:
        with open(f"/proc/{process.pid}/maps") as maps:
            return "jaxlib" in maps.read()
    except OSError:  # no Linux, or it has ended
        return True


def has_written(rows):
    return lambda process, file: file.exists() and file.read_bytes().count(b"\n") >= rows


MOMENTS = {
    "imports": (has_loaded_jax, (signal.SIGINT,), 130),
    "first": (has_written(1), (signal.SIGINT,), 130),
    "terminated": (has_written(ROWS // 2), (signal.SIGTERM,), -signal.SIGTERM),
}
"""What a process that listens has come to, what it gets then, and its exit code."""


class Runs:
    """Starts `layerscope generate` for a few prompts; what the first ones compile the others read."""

    def __init__(self, folder):
        self.folder = folder
        self.prompts, self.checkpoint = folder / "prompts.jsonl", folder / "checkpoint"
        save(random_model(num_layers=2, qk_norm="all"), self.checkpoint)
        rows = [{"prompt": [number, 5, 7], "stop_token_ids": []} for number in range(ROWS)]
        self.prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.env = os.environ | {"PYTHONPATH": os.getcwd()} | quick_compiling.ENVIRONMENT

    def command(self, name):
        files = [f"--prompts={self.prompts}", f"--out={self.folder / name}"]
        return ["generate", str(self.checkpoint), *files, "--max-new-tokens=40", "--max-num-seqs=1"]

    def content(self, name):
        file = self.folder / name
        return file.read_bytes() if file.exists() else b""

    def signalled(self, name):
        """A run that gets signals at a moment: exit code, stderr, and the seconds it then took."""
        has_come, signals, _ = MOMENTS[name]
        process = subprocess.Popen(
            [sys.executable, "-m", "layerscope_jax.cli", *self.command(name)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=self.env,
        )
        until_it_listens(process)
        while process.poll() is None and not has_come(process, self.folder / name):
            time.sleep(0.002)
        began = time.perf_counter()
        for number in signals:
            process.send_signal(number)
        said = process.communicate(timeout=600)[1]
        return process.returncode, said, time.perf_counter() - began

    def go_on(self, contents):
        """What each of some files is after the command was run again, in this process."""
        for number, content in enumerate(contents):
            (self.folder / f"again{number}").write_bytes(content)
            assert cli.main(self.command(f"again{number}")) == 0
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


def test_several_moments(tmp_path):
    runs = Runs(tmp_path)
    with not_ignored(signal.SIGINT):  # whoever runs the tests
        found = {name: runs.signalled(name) for name in MOMENTS}
    states = sorted({runs.content(name) for name in MOMENTS} | {b""})
    torn = runs.content("first")[:-9]  # nothing where nothing was written
    whole, *others = runs.go_on([*states, torn])
    assert whole.count(b"\n") == ROWS
    assert others == [whole] * len(states)
    took = []
    for name, (code, said, seconds) in found.items():
        content = runs.content(name)
        # Whole rows of the right ones and, at most, a piece of the next.
        assert whole.startswith(content), (name, content)
        if code == 0:  # it was done already, and nothing else may be
            assert content == whole
            continue
        took.append(seconds)
        _, signals, expected = MOMENTS[name]
        assert code == expected, (name, said)
        assert "Traceback" not in said, (name, said)
        *before, last = said.splitlines() or [""]
        assert last.startswith("interrupted") or signals != (signal.SIGINT,), (name, said)
        assert not before or content == whole, (name, said)  # then it is what a whole run says
    print(f"{len(took)} runs ended after", [round(one, 2) for one in sorted(took)])
    assert len(took) > len(MOMENTS) // 2
    assert max(took) < LIMIT_S
