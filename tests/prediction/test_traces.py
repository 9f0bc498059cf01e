"""Traces: what is finished stays, what is damaged is named, and routing is read without hidden states."""

import errno
import json
import pickle
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from layerscope_jax.checkpoints.identity import ModelIdentity
from layerscope_jax.prediction import traces
from layerscope_jax.prediction.traces import INDEX, Passage, Trace, TraceHeader, TraceWriter

L, E, K, P = 3, 8, 2, 5
MODEL = ModelIdentity(
    family="olmoe", num_layers=L, hidden_size=16, num_experts=E, experts_per_token=K, routers="ab" * 8
)
HEADER = TraceHeader(model=MODEL, hidden=P, settings={"length": 6, "seed": 0})


def chunk(seed, lengths=(6, 4)):
    rng = np.random.default_rng(seed)
    rows = sum(lengths)
    passages = [
        Passage("verse", f"{seed}/{index}", "train" if index % 2 else "heldout", 0, max(1, size // 2), size)
        for index, size in enumerate(lengths)
    ]
    return passages, {
        "tokens": rng.integers(0, 99, rows, np.int32),
        "experts": rng.integers(0, E, (rows, L, K), np.uint8),
        "weights": rng.random((rows, L, K)).astype(np.float16),
        "hidden": rng.standard_normal((rows, L, P)).astype(np.float16),
    }


@pytest.fixture
def folder(tmp_path):
    """Two chunks, unfinished."""
    writer = TraceWriter(tmp_path / "trace", HEADER)
    for seed in range(2):
        writer.write(*chunk(seed))
    return tmp_path / "trace"


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_written_is_mapped(folder):
    trace = Trace.open(folder)
    assert (trace.header, trace.rows, trace.complete) == (HEADER, 20, False)
    for seed, found in enumerate(trace.chunks):
        passages, arrays = chunk(seed)
        assert found.passages == tuple(passages)
        found.verify()
        for name, array in arrays.items():
            mapped = found.map(name)
            assert isinstance(mapped, np.memmap)
            np.testing.assert_array_equal(mapped, array)


def test_every_row_knows_its_place(folder):
    found = Trace.open(folder).chunks[0]
    assert found.passage_of_row().tolist() == [0] * 6 + [1] * 4
    assert found.positions().tolist() == [*range(6), *range(4)]
    assert found.decode().tolist() == [False] * 3 + [True] * 3 + [False] * 2 + [True] * 2
    rows = [(passage.document, where) for _, passage, where in Trace.open(folder).passages()]
    assert rows == [
        ("0/0", slice(0, 6)),
        ("0/1", slice(6, 10)),
        ("1/0", slice(0, 6)),
        ("1/1", slice(6, 10)),
    ]


def test_routing_is_read_where_hidden_states_are_gone(folder):
    (folder / "00000.hidden.npy").unlink()
    found = Trace.open(folder).chunks[0]
    assert found.map("experts").shape == (10, L, K)
    with pytest.raises(ValueError, match=r"00000\.hidden\.npy: expected .* got no file"):
        found.map("hidden")


def test_many_experts_need_wider_numbers(tmp_path):
    wide = replace(HEADER, model=replace(MODEL, num_experts=512), hidden=0)
    passages, arrays = chunk(0)
    del arrays["hidden"]
    arrays["experts"] = np.full((10, L, K), 511)
    TraceWriter(tmp_path, wide).write(passages, arrays)
    found = Trace.open(tmp_path).chunks[0]
    assert found.map("experts").dtype == np.uint16
    assert (found.map("experts") == 511).all()
    with pytest.raises(ValueError, match="expected hidden to be recorded, got tokens, experts, weights"):
        found.map("hidden")


@pytest.mark.parametrize("died", ["in a file", "before its line", "in its line"])
def test_a_writer_goes_on_where_another_died(folder, died):
    passages, arrays = chunk(2)
    if died == "in a file":
        (folder / "00002.experts.npy.tmp").write_bytes(b"half")
    elif died == "before its line":
        (folder / "00002.experts.npy").write_bytes(b"of no line")
    else:
        with (folder / INDEX).open("ab") as index:
            index.write(b'{"passages": [["verse", "2/')
    assert Trace.open(folder).rows == 20
    writer = TraceWriter(folder, HEADER)
    assert writer.done == chunk(0)[0] + chunk(1)[0]
    writer.write(passages, arrays)
    writer.finish()
    trace = Trace.open(folder)
    assert (trace.rows, trace.complete) == (30, True)
    for found in trace.chunks:
        found.verify()
    assert TraceWriter(folder, HEADER).complete


def test_a_trace_of_something_else_is_not_gone_on_with(folder):
    before = files(folder)
    with pytest.raises(ValueError, match=r"recorded differently: hidden 5 there, 4 now; seed 0 there, 1 now"):
        TraceWriter(folder, TraceHeader(model=MODEL, hidden=4, settings={"length": 6, "seed": 1}))
    other = replace(MODEL, num_experts=9, routers="cd" * 8)
    with pytest.raises(ValueError, match=r"another model: num_experts 8 there, 9 here; routers abab"):
        TraceWriter(folder, replace(HEADER, model=other))
    assert files(folder) == before


def test_a_state_that_is_not_finite_is_refused(folder):
    before = files(folder)
    passages, arrays = chunk(2)
    arrays["hidden"][3, 1, 2] = np.nan
    with pytest.raises(ValueError, match=r"hidden states of layers \[1\] are not finite"):
        TraceWriter(folder, HEADER).write(passages, arrays)
    assert files(folder) == before


@pytest.mark.parametrize("full", ["data", "index"])
def test_a_full_disk_loses_nothing(folder, monkeypatch, full):
    before = files(folder)
    writer = TraceWriter(folder, HEADER)

    def no_room(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        where = (traces.np, "save") if full == "data" else (traces, "finished_lines")
        patch.setattr(*where, no_room)
        with pytest.raises(ValueError, match="No space left on device"):
            writer.write(*chunk(2))
    if full == "data":
        assert files(folder) == before
    writer.write(*chunk(2))
    assert Trace.open(folder).rows == 30


def test_damage_is_named(folder):
    path = folder / "00001.weights.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    found = Trace.open(folder).chunks
    found[0].verify()
    with pytest.raises(ValueError, match=r"checksums differ\): 00001\.weights\.npy"):
        found[1].verify()
    path.write_bytes(whole[:-7])
    with pytest.raises(ValueError, match=rf"expected {len(whole)} bytes, got {len(whole) - 7}"):
        found[1].map("weights")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "trace.json").unlink(), "expected a trace"),
        (lambda folder: (folder / "trace.json").write_text("{}"), "expected trace format 1, got None"),
        (
            lambda folder: (folder / "trace.json").write_text(json.dumps({"format": 1, "model": {}})),
            "expected the header of a trace",
        ),
        (lambda folder: (folder / INDEX).write_text("{}\n"), r"line 1: expected a chunk, got KeyError"),
    ],
)
def test_what_is_no_trace_is_refused(folder, spoil, message):
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        Trace.open(folder)


def index(folder):
    return [json.loads(line) for line in (folder / INDEX).read_text().splitlines()]


def write_index(folder, entries):
    (folder / INDEX).write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def refusal(call):
    with pytest.raises(ValueError, match=r".") as refused:
        call()
    return str(refused.value)


def npy(header):
    """An array's file that says `header` of itself, as long as the recorded one."""
    text = header.encode()
    text += b" " * (-(10 + len(text) + 1) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<i4', 'fortran_order': False, 'shape': (1000000000000,), }",
        "{'descr': '<i4', 'fortran_order': False, 'shape': (-10,), }",
        "{'descr': '<i4', 'fortran_order': False, 'shape': (9,), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (10,), }",
        "{'descr': '>i4', 'fortran_order': False, 'shape': (10,), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (10,), }",
        "{'descr': '<i4', 'fortran_order': False, 'shape': 10, }",
        "{'descr': '<i4', 'shape': (10,), }",
        "{'descr': '<i4', 'fortran_order': False, 'shape': (10,)",
        "[" * 9000,
        "\xff\xfe",
    ],
    ids=lambda header: header[-24:],
)
def test_an_array_whose_head_lies_is_refused(folder, header):
    path = folder / "00000.tokens.npy"
    size = path.stat().st_size
    content = npy(header)[:size]
    path.write_bytes(content + bytes(size - len(content)))
    message = refusal(lambda: Trace.open(folder).chunks[0].map("tokens"))
    assert message.startswith(f"{path}: expected ")
    assert message.endswith("copy it again")


class Bomb:
    """Leaves a file behind if anybody unpickles it."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("kind", ["pickle", "object array", "npz"])
def test_nothing_is_unpickled(folder, tmp_path, kind):
    path, went_off = folder / "00000.experts.npy", tmp_path / "went off"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb(went_off)))
    else:
        with path.open("wb") as file:
            array = np.array([Bomb(went_off)], object)
            np.save(file, array, allow_pickle=True) if kind == "object array" else np.savez(file, array)
    entries = index(folder)
    size = 4096  # as the index would say it
    path.write_bytes(path.read_bytes() + bytes(size - path.stat().st_size))
    entries[0]["files"]["experts"][0] = size
    write_index(folder, entries)
    assert refusal(lambda: Trace.open(folder).chunks[0].map("experts")).startswith(
        f"{path}: expected an array"
    )
    assert not went_off.exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda entry: entry["files"].pop("weights"), "instead of tokens, experts, weights, hidden"),
        (lambda entry: entry["files"].update({"../../x": [1, 2]}), "instead of tokens"),
        (lambda entry: entry["files"].update(tokens=[-1, 2]), "no size and CRC-32 of tokens"),
        (lambda entry: entry["files"].update(tokens=["4", 2]), "no size and CRC-32 of tokens"),
        (lambda entry: entry["files"].update(tokens=[168, 2**40]), "no size and CRC-32 of tokens"),
        (lambda entry: entry["files"].update(tokens=7), "TypeError"),
        (lambda entry: entry.update(files=[]), "AttributeError"),
        (lambda entry: entry["passages"][0].pop(), "TypeError"),
        (lambda entry: entry["passages"].append(entry["passages"][0]), "no size .* 16 rows"),
        (lambda entry: entry["passages"][0].__setitem__(5, 10**12), "no passage|no size"),
        (lambda entry: entry["passages"][0].__setitem__(5, -6), "no passage"),
        (lambda entry: entry["passages"][0].__setitem__(5, 0), "no passage"),
        (lambda entry: entry["passages"][0].__setitem__(5, float("inf")), "finite"),
        (lambda entry: entry["passages"][0].__setitem__(4, 7), "no passage"),
        (lambda entry: entry["passages"][0].__setitem__(3, "0"), "no passage"),
        (lambda entry: entry["passages"][0].__setitem__(2, "both"), "no passage"),
        (lambda entry: entry["passages"][0].__setitem__(0, None), "no passage"),
    ],
)
def test_a_damaged_index_is_refused_by_line(folder, spoil, message):
    entries = index(folder)
    spoil(entries[1])
    write_index(folder, entries)
    found = refusal(lambda: Trace.open(folder))
    assert found.startswith(f"{folder / INDEX}, line 2: expected a chunk, got ")
    assert re.search(message, found)


def test_a_chunk_that_is_there_twice_is_refused(folder):
    entries = index(folder)
    write_index(folder, [*entries, entries[0]])
    message = refusal(lambda: Trace.open(folder))
    assert "line 3: expected a chunk" in message
    assert "line 1 a second time" in message


def test_a_chunk_that_is_missing_is_named(folder):
    for file in folder.glob("00001.*"):
        file.unlink()
    assert "00001.tokens.npy: expected" in refusal(lambda: Trace.open(folder).chunks[1].verify())


@pytest.mark.parametrize("line", [b"[" * 100_000, b"\xff\xfe{\x00", b"7", b"null", b"", b"{'a': 1}"], ids=len)
def test_a_line_that_is_no_json_is_refused(folder, line):
    with (folder / INDEX).open("ab") as file:
        file.write(line + b"\n")
    assert "line 3: expected a chunk" in refusal(lambda: Trace.open(folder))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden", -1),
        ("hidden", 17),
        ("hidden", "5"),
        ("settings", [1]),
        ("model", None),
        ("model", MODEL.to_json() | {"num_experts": 10**30}),
        ("model", MODEL.to_json() | {"num_layers": 0}),
    ],
)
def test_a_head_that_is_none_is_refused(folder, name, value):
    record = json.loads((folder / "trace.json").read_text())
    (folder / "trace.json").write_text(json.dumps(record | {name: value}))
    assert refusal(lambda: Trace.open(folder)).startswith(
        f"{folder / 'trace.json'}: expected the header of a trace"
    )


def test_experts_that_the_model_has_not_are_found(folder):
    """Where a file and its checksum agree, but another model wrote them."""
    path = folder / "00000.experts.npy"
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(bytes([E]))
    entries = index(folder)
    entries[0]["files"]["experts"][1] = traces.checksum(path)
    write_index(folder, entries)
    message = refusal(lambda: Trace.open(folder).chunks[0].verify())
    assert f"expected experts 0..{E - 1}, got {E}" in message


def test_an_index_that_is_a_folder_is_refused(folder):
    (folder / INDEX).unlink()
    (folder / INDEX).mkdir()
    assert "expected the index of a trace" in refusal(lambda: Trace.open(folder))
