"""Where calls of Linux are missing, as on Windows and macOS, a process still loads a model and generates."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from layerscope_jax.support import files

MISSING = ("fcntl", "resource", "termios", "pwd", "grp", "readline")
"""Modules that Windows does not have."""

CALLS = ("preadv", "pread", "sched_getaffinity", "posix_fadvise", "O_DIRECT", "O_NONBLOCK", "sysconf")
"""What its `os` does not have, or macOS's."""

PROGRAM = f"""
import os, signal, sys, types
import flax.nnx, huggingface_hub, numba, rich.console, tokenizers  # which know these systems
for name in {MISSING}:
    sys.modules[name] = None
sys.modules["msvcrt"] = types.SimpleNamespace(locking=lambda *_: None, LK_NBLCK=2)
for name in {CALLS}:
    if hasattr(os, name):
        delattr(os, name)
del signal.SIGKILL
from layerscope_jax.cli.main import main
for options in (["--policy=lru", "--device-budget=70KB"], ["--policy=host-only", "--host-budget=40KB"]):
    code = main(["generate", *sys.argv[1:], *options])
    if code:
        raise SystemExit(code)
"""


def test_a_model_runs_without_calls_of_linux_and_without_compiled_kernels(tiny):
    command = [str(tiny), "--prompt=Call me", "--max-new-tokens=2", "--ignore-eos", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *command],
        env=os.environ | {"NUMBA_DISABLE_JIT": "1", "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    first, second = map(json.loads, done.stdout.splitlines())
    assert first["completions"][0]["token_ids"] == second["completions"][0]["token_ids"]
    assert (first["stats"]["policy"], second["stats"]["policy"]) == ("lru", "host-only")
    assert first["stats"]["kernels"] == {"xla": 1}
    assert second["stats"]["bytes_read"] > 0


@pytest.mark.parametrize("size", [0, 1, 1000])
def test_reading_at_an_offset_is_what_the_system_does(size, tmp_path, monkeypatch):
    file = tmp_path / "bytes"
    file.write_bytes(os.urandom(1000))
    monkeypatch.setattr(files, "_MOST_READ", 300)
    monkeypatch.setattr(files, "pread", files._seek_and_read)
    content = file.read_bytes()

    def read(start):
        memory = bytearray(size)
        return memory, files._read_and_copy(opened.fileno(), [memoryview(memory)], start)

    starts = [0, 1, 500, 999, 1000] * 20
    with file.open("rb", buffering=0) as opened, ThreadPoolExecutor(4) as threads:
        for start, (memory, came) in zip(starts, threads.map(read, starts), strict=True):
            assert came == min(size, 300, 1000 - start)
            assert memory[:came] == content[start : start + came]
