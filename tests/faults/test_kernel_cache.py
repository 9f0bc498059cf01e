"""Compiled kernels on disk: whatever is wrong with a file, the result is the same and the file made anew."""

import logging
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from helpers import in_time

import layerscope_jax
from layerscope_jax.cli import main as cli
from layerscope_jax.support import compile_turns, kernel_cache
from layerscope_jax.support.compile_turns import Turns
from layerscope_jax.support.njit import njit

PACKAGE = Path(layerscope_jax.__file__).parent

COMPUTE = """
import numpy as np
from layerscope_jax.kernels.numbers import silu
from layerscope_jax.scheduling.lowest import lowest
print(silu(np.float32(1)), *lowest(np.array([3.0, 1.0, 2.0]), 2))
"""


def python(code, root=PACKAGE.parent, **environment):
    """What a process prints, which may say nothing else; its LLVM optimises nothing, to save time."""
    known = os.environ | {"PYTHONPATH": str(root), "NUMBA_OPT": "0"} | environment
    command = [sys.executable, "-W", "error", "-c", code]
    done = in_time(lambda: subprocess.run(command, env=known, cwd=root, capture_output=True, text=True), 300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def emptied(file):
    file.write_bytes(b"")


def halved(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def scrambled(file):
    content = bytearray(file.read_bytes())
    content[50:] = np.random.default_rng(0).bytes(len(content) - 50)
    file.write_bytes(content)


def one_bit_less(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def made_a_folder(file):
    file.unlink()
    (file / "inside").mkdir(parents=True)


def locked(file):
    file.chmod(0)


DAMAGES = [emptied, halved, scrambled, one_bit_less, made_a_folder, locked]
if not getattr(os, "geteuid", lambda: 1)():
    DAMAGES.remove(locked)  # root reads it all the same, and compiles no function that it calls


def files_in(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_damaged_cache_is_made_anew_by_the_next_process(tmp_path):
    expected = python(COMPUTE, NUMBA_CACHE_DIR=str(tmp_path))
    whole = files_in(tmp_path)
    assert len(whole) >= 3
    for number, file in enumerate(whole):
        DAMAGES[number % len(DAMAGES)](file)
    assert python(COMPUTE, NUMBA_CACHE_DIR=str(tmp_path)) == expected
    assert files_in(tmp_path) == whole
    assert all(file.stat().st_size > 100 for file in whole)


def test_an_edit_of_what_another_file_takes_in_is_seen(tmp_path):
    root, cache = tmp_path / "root", str(tmp_path / "cache")
    copy = root / "layerscope_jax"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "shipped"))
    code = "from layerscope_jax.kernels.panels import shared_out; print(len(shared_out(60)))"
    python(code, root, NUMBA_CACHE_DIR=cache)
    strips = copy / "kernels" / "strips.py"
    edited = strips.read_text().replace("TOKENS = 12 if WIDE else 6", "TOKENS = 4")
    assert edited != strips.read_text()
    strips.write_text(edited)
    assert python(code, root, NUMBA_CACHE_DIR=cache) == "16\n"


def test_without_a_place_for_it_everything_is_compiled_all_the_same():
    code = (
        "from layerscope_jax.scheduling.lowest import lowest\nprint(lowest(__import__('numpy').eye(2)[0], 1))"
    )
    assert python(code, NUMBA_CACHE_DIR=os.devnull) == "[1]\n"


@pytest.fixture
def folder(monkeypatch, tmp_path):
    found = tmp_path / "kernels-these"
    monkeypatch.setattr(kernel_cache, "folders", lambda: (found,))
    for once in (kernel_cache.say_if_cold, kernel_cache.touch, kernel_cache.prune):
        once.cache_clear()
    yield found
    for once in (kernel_cache.say_if_cold, kernel_cache.touch, kernel_cache.prune):
        once.cache_clear()


def tripled(by=3):
    """A kernel as another process has it, and what it closes over."""

    @njit(cache=True)
    def triple(x):
        return x * by

    return triple


def calling(inner):
    @njit(cache=True)
    def outer(x):
        return inner(x)

    return outer


def hits(kernel):
    return sum(kernel.stats.cache_hits.values())


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_found_and_replaced(folder, damage):
    assert tripled()(2) == 6
    (file,) = files_in(folder)
    again = tripled()
    assert (again(2), hits(again)) == (6, 1)
    damage(file)
    after = tripled()
    assert after(2) == 6
    assert hits(after) == (1 if damage is locked and os.access(file, os.R_OK) else 0)  # root reads it
    repaired = tripled()
    assert (repaired(2), hits(repaired)) == (6, 1)


def test_what_is_whole_and_of_another_function_is_replaced(folder):
    tripled()(2)
    (file,) = files_in(folder)
    kernel_cache.write(file, kernel_cache.dumps((("another",), ())))
    again = tripled()
    assert (again(2), hits(again)) == (6, 0)


def test_what_llvm_cannot_read_is_replaced(folder):
    """Whole, but of a numba that made it in another way."""
    kernel = tripled()
    kernel(2)
    (file,) = files_in(folder)
    key = kernel._cache._key(*kernel._cache_misses)
    kernel_cache.write(file, kernel_cache.dumps((key, (("object", b"none", b""), *[None] * 8))))
    again = tripled()
    assert (again(2), hits(again)) == (6, 0)
    repaired = tripled()
    assert (repaired(2), hits(repaired)) == (6, 1)


def test_types_and_what_is_closed_over_are_told_apart(folder):
    assert [tripled()(2), tripled()(0.5), tripled(4)(2)] == [6, 1.5, 8]
    assert len(files_in(folder)) == 3
    for by, x, expected in ((3, 2, 6), (3, 0.5, 1.5), (4, 2, 8)):
        kernel = tripled(by)
        assert (kernel(x), hits(kernel)) == (expected, 1)


def test_functions_that_are_closed_over_are_known_again(folder):
    """Numba gives each one a name of its own in every process."""
    for expected in (0, 1):
        kernel = tripled()
        outer = calling(kernel)
        assert (outer(2), hits(outer)) == (6, expected)


def test_what_they_close_over_themselves_counts_too():
    def adding(number):
        @njit()
        def add(x):
            return x + number

        return add

    def twice(add):
        def both(x):
            return add(add(x))

        return kernel_cache.KernelCache(both)._key(())

    first, other, same = (twice(adding(number)) for number in (1, 2, 1))
    assert first == same != other


def test_a_full_disk_leaves_nothing_behind(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(kernel_cache.os, "replace", full)
        assert tripled()(2) == 6
    assert not files_in(folder)
    assert tripled()(2) == 6
    assert len(files_in(folder)) == 1


def test_an_interrupt_leaves_nothing_behind(folder, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(kernel_cache.os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tripled()(2)
    assert not files_in(folder)


def test_two_that_write_the_same_file_do_not_mix(folder, monkeypatch):
    """One has written half of it when the other begins and ends."""
    reached, go, replace = threading.Event(), threading.Event(), os.replace

    def held(source, to):
        if threading.current_thread() is slow:
            reached.set()
            assert go.wait(60)
        replace(source, to)

    monkeypatch.setattr(kernel_cache.os, "replace", held)
    file = folder / "one.kernel"
    slow = threading.Thread(target=kernel_cache.write, args=(file, b"slow" * 1000))
    slow.start()
    assert reached.wait(60)
    kernel_cache.write(file, b"quick")
    assert file.read_bytes()[32:] == b"quick"
    go.set()
    slow.join()
    assert file.read_bytes()[32:] == b"slow" * 1000
    assert files_in(folder) == [file]


def test_one_process_compiles_and_the_others_wait_and_read(folder, monkeypatch):
    """A lock is of whoever opened its file, so that a thread stands for another process here."""
    folder.mkdir()
    file, waits, went_on = folder / "f.kernel", threading.Event(), []
    one, other = Turns(), Turns()
    assert not one.take(file)
    assert not one.take(file)  # it failed before, and tries again
    monkeypatch.setattr(compile_turns.time, "sleep", lambda _: waits.set())
    thread = threading.Thread(target=lambda: went_on.append(other.take(file)))
    thread.start()
    assert waits.wait(60)
    assert not went_on
    one.end(file)
    thread.join(60)
    assert went_on == [True]
    other.end(file)
    assert not files_in(folder)
    assert not one.take(file)
    monkeypatch.setattr(compile_turns, "WAIT_S", 0.01)
    assert other.take(file)  # it does not wait forever
    assert not other._held
    one.end(file)


def test_folders_of_other_sources_are_kept_for_a_while(folder):
    for age in range(20):
        other = folder.parent / f"kernels-other{age}"
        other.mkdir()
        (other / "f.kernel").write_bytes(b"")
        os.utime(other, (1e9 - age, 1e9 - age))
    (folder.parent / "somebody else's").mkdir()
    folder.mkdir()
    unfinished, begun = folder / "g.kernel.0.tmp", folder / "g.kernel.1.tmp"
    for file in (unfinished, begun):
        file.write_bytes(b"")
    os.utime(unfinished, (1e9, 1e9))
    tripled()(2)
    left = {path.name for path in folder.parent.iterdir()}
    others = {f"kernels-other{age}" for age in range(kernel_cache.KEPT - 1)}
    assert left == others | {"kernels-these", "somebody else's"}
    assert not unfinished.exists()
    assert begun.exists()


def test_it_is_said_once_where_nothing_is_there_yet(folder, caplog):
    with caplog.at_level(logging.INFO, "layerscope_jax"):
        tripled()(2)
        tripled()(0.5)
        tripled(5)(2)
        kernel_cache.say_if_cold.cache_clear()  # as another process
        tripled(6)(2)
    (record,) = caplog.records
    assert "compiling kernels for this CPU" in record.getMessage()
    assert str(folder) in record.getMessage()


def test_it_is_said_where_nothing_can_be_kept(monkeypatch, folder, caplog):
    monkeypatch.setattr(kernel_cache, "folders", lambda: (Path(os.devnull) / "kernels",))
    with caplog.at_level(logging.INFO, "layerscope_jax"):
        assert tripled()(2) == 6
    (record,) = caplog.records
    assert "NUMBA_CACHE_DIR" in record.getMessage()


def test_the_command_line_prints_it(monkeypatch, capsys):
    def run(self):
        logging.getLogger("layerscope_jax").info("compiling %s", "kernels")
        return 0

    monkeypatch.setattr(cli.Generate, "run", run)
    assert cli.main(["generate", "absent", "--prompt=x"]) == 0
    assert capsys.readouterr() == ("", "compiling kernels\n")
    logging.getLogger("layerscope_jax").info("nobody asked")
    assert capsys.readouterr() == ("", "")


def test_folders_are_named_by_sources_and_target(monkeypatch, tmp_path):
    monkeypatch.setattr(kernel_cache, "PACKAGE", tmp_path)
    monkeypatch.setattr(kernel_cache.config, "CACHE_DIR", str(tmp_path / "cache"))
    names = []

    def name():
        (found,) = kernel_cache.folders.__wrapped__()
        assert found.is_relative_to(tmp_path / "cache")
        names.append(found.name)

    assert kernel_cache.folders.__wrapped__() == ()  # no source can be read
    (tmp_path / "one.py").write_text("import numba")
    (tmp_path / "policy.py").write_text("nothing to compile")
    name()
    (tmp_path / "policy.py").write_text("nothing to compile, edited")
    name()
    (tmp_path / "one.py").write_text("import numba, edited")
    name()
    monkeypatch.setattr(kernel_cache.target.config, "CPU_NAME", "generic")
    name()
    monkeypatch.setattr(kernel_cache.target.config, "OPT", 0)
    name()
    monkeypatch.setattr(kernel_cache.numba, "__version__", "0.99")
    name()
    assert names[0] == names[1]
    assert len(set(names)) == 5
