"""JSON that says too much or too little, and files that must be replaced as a set or not at all."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from layerscope_jax.support import files
from layerscope_jax.support.files import read_json, replace_files, write_file


def names(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


# JSON


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"a": NaN}', "a: expected a finite number, got nan"),
        (b'{"a": {"b": [1, -Infinity]}}', r"a\.b\[1\]: expected a finite number, got -inf"),
        (b'{"eps": 1e400}', "eps: expected a finite number, got inf"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "expected numbers of ordinary length"),
        (b"[" * 100_000 + b"]" * 100_000, "nested a few levels deep"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested a few levels deep"),
        ('{"a": 1}'.encode("utf-16"), "expected UTF-8, got UTF-16; save it as plain UTF-8"),
        (b'\xef\xbb\xbf{"a": 1}', "got a byte order mark before it"),
        ('{"a": "é"}'.encode("latin-1"), "expected UTF-8, got the byte 0xe9 at 7"),
        (b'{"a": 1, "b": 2, "a": 3}', "'a' more than once in one object"),
        (b'{"x": {"a": 1, "a": 1}}', "'a' more than once in one object"),
        (b"[]", "expected a JSON object, got list"),
        (b"3", "expected a JSON object, got int"),
        (b"", "expected JSON, got Expecting value"),
    ],
)
def test_json_that_cannot_be_meant_is_refused(tmp_path, content, words):
    file = tmp_path / "some.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=words) as raised:
        read_json(file)
    assert str(raised.value).startswith(f"{file}: ")
    assert len(str(raised.value)) < 500


def test_a_number_of_many_digits_is_a_number(tmp_path):
    """Tokenizers are saved with a `model_max_length` of thirty."""
    (tmp_path / "a.json").write_text('{"a": 1000000000000000019884624838656, "b": [1e-9, -0.5]}')
    assert read_json(tmp_path / "a.json") == {"a": 1000000000000000019884624838656, "b": [1e-9, -0.5]}


def test_a_folder_is_no_json_file(tmp_path):
    with pytest.raises(ValueError, match="expected a file that can be read, got Is a directory"):
        read_json(tmp_path)


# Sets of files


@pytest.fixture
def folder(tmp_path):
    for name in "abc":
        (tmp_path / name).write_text(f"old {name}")
    return tmp_path


OLD = {name: f"old {name}" for name in "abc"}
FAILURES = [OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), MemoryError()]
WRITERS = {name: lambda file, name=name: file.write_text(f"new {name}") for name in "abcd"}


@pytest.mark.parametrize("error", FAILURES, ids=repr)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("call", range(8))
def test_a_failure_at_any_rename_leaves_the_old_set(folder, monkeypatch, error, when, call):
    """Of four, one of them new: each `link` and each `replace` fails in turn, before and after it acts."""
    calls = []

    def failing(act):
        def wrapped(*arguments, **settings):
            calls.append(act)
            mine = len(calls) - 1 == call
            if mine and when == "before":
                raise error
            result = act(*arguments, **settings)
            if mine:
                raise error
            return result

        return wrapped

    monkeypatch.setattr(os, "replace", failing(os.replace))
    monkeypatch.setattr(os, "link", failing(os.link))
    kind = ValueError if isinstance(error, OSError) else type(error)
    if call == 7:  # three links, four replaces
        replace_files(folder, WRITERS)
        assert names(folder) == {name: f"new {name}" for name in "abcd"}
        return
    linking = call < 6 and call % 2 == 0
    if linking and isinstance(error, OSError):  # a file system without links
        replace_files(folder, WRITERS)
        assert names(folder) == {name: f"new {name}" for name in "abcd"}
        return
    with pytest.raises(kind):
        replace_files(folder, WRITERS)
    assert names(folder) == OLD


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()], ids=repr)
def test_a_second_interrupt_does_not_stop_the_way_back(folder, monkeypatch, error):
    replace, calls = os.replace, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise error
        if len(calls) == 4:
            raise KeyboardInterrupt
        replace(*arguments)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(ValueError if isinstance(error, OSError) else KeyboardInterrupt):
        replace_files(folder, WRITERS)
    assert names(folder) == OLD


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt(), ZeroDivisionError()], ids=repr)
def test_a_writer_that_fails_leaves_nothing(folder, error):
    def fail(file):
        file.write_text("half")
        raise error

    with pytest.raises(ValueError if isinstance(error, OSError) else type(error)):
        replace_files(folder, WRITERS | {"e": fail})
    assert names(folder) == OLD


def test_two_who_write_the_same_file_do_not_meet(folder):
    """As two processes do: one begins and ends while the other is in the middle of its file."""

    def slow(file):
        file.write_text("first half, ")
        write_file(folder / "a", "the other's")
        assert (folder / "a").read_text() == "the other's"
        with file.open("a") as opened:
            opened.write("second half")

    replace_files(folder, {"a": slow})
    assert names(folder) == OLD | {"a": "first half, second half"}


def test_readers_always_find_a_file(folder, monkeypatch):
    """At every step that touches names."""
    seen = []

    def watched(act):
        def wrapped(*arguments, **settings):
            seen.append([(folder / name).read_text()[:3] for name in "abc"])
            act(*arguments, **settings)
            seen.append([(folder / name).read_text()[:3] for name in "abc"])

        return wrapped

    for call in ("replace", "link", "rename"):
        monkeypatch.setattr(os, call, watched(getattr(os, call)))
    replace_files(folder, {name: WRITERS[name] for name in "abc"})
    assert len(seen) == 12
    assert seen[0] == ["old"] * 3
    assert seen[-1] == ["new"] * 3


def test_what_is_renamed_is_on_disk_first_and_then_the_names(folder, monkeypatch):
    log = []
    fsync, replace = os.fsync, os.replace

    def synced(opened):
        log.append(("sync", Path(os.readlink(f"/proc/self/fd/{opened}"))))
        fsync(opened)

    monkeypatch.setattr(os, "fsync", synced)

    def renamed(new, final):
        log.append(("to", Path(new)))
        replace(new, final)

    monkeypatch.setattr(os, "replace", renamed)
    replace_files(folder, {"a": WRITERS["a"], "d": WRITERS["d"]})
    steps = [step for step, _ in log]
    assert steps == ["sync", "sync", "to", "to", "sync"]
    assert [path for _, path in log[:2]] == [path for _, path in log[2:4]]
    assert log[-1][1] == folder.resolve()


def test_a_folder_in_the_place_of_a_file_stays(folder):
    (folder / "d").mkdir()
    (folder / "d" / "inside").write_text("kept")
    with pytest.raises(ValueError, match=r"cannot write to .*Is a directory"):
        replace_files(folder, WRITERS)
    assert (folder / "d" / "inside").read_text() == "kept"
    assert {path.name for path in folder.iterdir()} == {"a", "b", "c", "d"}
    assert (folder / "a").read_text() == "old a"


def test_a_link_is_replaced_and_not_what_it_leads_to(folder):
    (folder / "link").symlink_to("a")
    replace_files(folder, {"link": lambda file: file.write_text("new"), "b": WRITERS["b"]})
    assert names(folder) == OLD | {"link": "new", "b": "new b"}
    assert not (folder / "link").is_symlink()


def test_files_are_as_readable_as_any(folder):
    mask = os.umask(0o022)
    try:
        replace_files(folder, {"a": WRITERS["a"]})
    finally:
        os.umask(mask)
    assert (folder / "a").stat().st_mode & 0o777 == 0o644


def test_a_file_holds_text_bytes_an_array_or_arrays(tmp_path):
    numbers = np.arange(6, dtype=np.int32).reshape(2, 3)
    contents = {"text": "é\n", "bytes": b"\xff", "array": numbers, "arrays": {"a": numbers, "b": numbers[0]}}
    replace_files(tmp_path / "new", contents)
    folder = tmp_path / "new"
    assert ((folder / "text").read_bytes(), (folder / "bytes").read_bytes()) == ("é\n".encode(), b"\xff")
    np.testing.assert_array_equal(np.load(folder / "array"), numbers)
    with np.load(folder / "arrays") as arrays:
        assert sorted(arrays) == ["a", "b"]
        np.testing.assert_array_equal(arrays["b"], numbers[0])
    assert len(list(folder.iterdir())) == 4


def test_a_link_to_nowhere_is_said(tmp_path):
    (tmp_path / "there").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"there: expected a file, got a link to .*gone, which is not there"):
        files.is_there(tmp_path / "there")
    assert not files.is_there(tmp_path / "nothing")
    assert files.is_there(tmp_path)


def test_lines_of_a_trace_are_read_as_strictly(tmp_path):
    from layerscope_jax.checkpoints.identity import ModelIdentity
    from layerscope_jax.prediction.traces import INDEX, Trace, TraceHeader, TraceWriter

    model = ModelIdentity(
        family="olmoe", num_layers=1, hidden_size=2, num_experts=2, experts_per_token=1, routers="0"
    )
    TraceWriter(tmp_path, TraceHeader(model=model, hidden=0))
    for line in (b"[" * 100_000, b'{"passages": NaN}', b"\xff"):
        (tmp_path / INDEX).write_bytes(line + b"\n")
        with pytest.raises(ValueError, match="line 1: expected a chunk"):
            Trace.open(tmp_path)
