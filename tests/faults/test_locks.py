"""Two runs for one place: the second is told who has it, and changes nothing."""

import json
import os
import signal
import subprocess
import sys

import pytest

from layerscope_jax import Request
from layerscope_jax.generation.batch_files import CompletionFile, completion
from layerscope_jax.generation.completions import Output
from layerscope_jax.generation.prompt_files import Row
from layerscope_jax.support import locks
from layerscope_jax.support.locks import locked, locked_folder

ROW = Row("a", Request(prompt="b"), "")
HOLDER = r"being written by another run \(process \d+ on \S+, since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\)"
HOLD = "import sys, time; from pathlib import Path; from layerscope_jax.support.locks import locked\n"
HOLD += "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"


def listing(folder):
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")
    }


@pytest.mark.parametrize("kind", ["file", "no file yet", "folder"])
def test_the_second_is_refused(tmp_path, kind):
    place = tmp_path / "out"
    if kind == "file":
        place.write_text("x")
    if kind == "folder":
        place.mkdir()
    before = listing(tmp_path)
    with locked(place):
        held = listing(tmp_path)
        with pytest.raises(ValueError, match=HOLDER) as refused, locked(place):
            pass
        assert f"process {os.getpid()} on" in str(refused.value)
        assert listing(tmp_path) == held
    assert listing(tmp_path) == before
    with locked(place):
        pass


def test_by_another_name_it_is_the_same_place(tmp_path):
    place, link = tmp_path / "out", tmp_path / "link"
    place.write_text("x")
    link.symlink_to(place)
    with locked(place), pytest.raises(ValueError, match=HOLDER), locked(link):
        pass


def test_a_killed_run_holds_nobody_up(tmp_path):
    place = tmp_path / "out"
    env = os.environ | {"PYTHONPATH": os.getcwd()}
    held = subprocess.Popen([sys.executable, "-c", HOLD, place], stdout=subprocess.PIPE, env=env)
    assert held.stdout.readline() == b"held\n"
    with pytest.raises(ValueError, match=f"process {held.pid} on"), locked(place):
        pass
    held.send_signal(signal.SIGKILL if os.name == "posix" else signal.SIGTERM)
    held.communicate()
    assert (tmp_path / "out.lock").exists()
    with locked(place):
        assert json.loads((tmp_path / "out.lock").read_text())["pid"] == os.getpid()
    assert listing(tmp_path) == {}


def test_a_lock_that_its_run_removes_meanwhile_is_none(tmp_path, monkeypatch):
    """Between opening the file and locking it, whoever held it may end and remove it."""
    place, path, lock = tmp_path / "out", tmp_path / "out.lock", locks.try_lock
    opened = []

    def late(number):
        opened.append(number)
        if len(opened) == 1:
            path.unlink()
        lock(number)

    monkeypatch.setattr(locks, "try_lock", late)
    with locked(place):
        assert len(opened) == 2
        assert path.exists()
        with pytest.raises(ValueError, match=HOLDER), locked(place):
            pass


def test_where_there_are_no_locks_nobody_is_kept_out(tmp_path, monkeypatch):
    def none(number):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(locks, "try_lock", none)
    with locked(tmp_path / "out"), locked(tmp_path / "out"):
        pass


def test_a_folder_is_not_left_behind_empty(tmp_path):
    with locked_folder(tmp_path / "a"):
        pass
    with locked_folder(tmp_path / "b"):
        (tmp_path / "b" / "x").write_text("x")
    assert {str(path) for path in listing(tmp_path)} == {"b", os.path.join("b", "x")}


def test_completions(tmp_path):
    file = tmp_path / "out.jsonl"
    line = completion(ROW, [Output(text="text", token_ids=[1], finish_reason="stop")], "m")
    with CompletionFile(file, [ROW], "m") as first:
        with pytest.raises(ValueError, match=HOLDER):
            CompletionFile(file, [ROW], "m")
        first.write(line)
        with pytest.raises(ValueError, match=HOLDER):
            CompletionFile(file, [ROW], "m")
    assert listing(tmp_path) == {file.relative_to(tmp_path): line}
    for _ in range(2):  # one that is refused lets go of it
        with pytest.raises(ValueError, match="belongs to other prompts"):
            CompletionFile(file, [], "m")
    assert listing(tmp_path) == {file.relative_to(tmp_path): line}
