"""A predictor's folder that is not as it was written is refused in words, and no bit of it goes unnoticed."""

import json
import warnings

import numpy as np
import pytest
from helpers import in_time
from safetensors.numpy import load_file, save_file
from synthetic import untrained, write_trace

import predictor
from predictor import fitted
from predictor.llapor import LLaPor
from predictor.pca import Basis
from predictor.routers import Routers


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    untrained(write_trace(folder / "trace", documents=8, heldout=2)).save(folder / "predictor")
    return folder / "predictor"


@pytest.fixture
def folder(made, tmp_path):
    for file in made.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def edit(folder, path, value):
    file = folder / "predictor.json"
    record = inner = json.loads(file.read_text())
    *folders, name = path.split(".")
    for part in folders:
        inner = inner[part]
    if value is ...:
        del inner[name]
    else:
        inner[name] = value
    file.write_text(json.dumps(record))


def refusal(folder):
    with pytest.raises(ValueError, match=r".") as refused:
        in_time(lambda: LLaPor.load(folder), 30)
    assert str(folder) in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("look_ahead", -1, "look_ahead must be a whole number in 1..256, got -1"),
        ("look_ahead", 0, "look_ahead must be"),
        ("look_ahead", "2", "look_ahead must be a whole number in 1..256, got '2'"),
        ("look_ahead", 2.0, "look_ahead must be"),
        ("look_ahead", True, "look_ahead must be"),
        ("look_ahead", 10**9, "look_ahead must be"),
        ("look_ahead", None, "look_ahead must be"),
        ("look_ahead", ..., "look_ahead must be"),
        ("look_ahead", 3, "has shape"),
        ("model", [], "model must be an object, got '[]'"),
        ("model.num_layers", 10**6, "pca.mean has shape (4, 8)"),
        ("model.num_layers", 10**9, "num_layers * num_experts must be at most 16,777,216"),
        ("model.num_layers", 0, "num_layers"),
        ("model.num_experts", -8, "num_experts"),
        ("model.num_experts", 10**30, "num_experts"),
        ("model.num_experts", 2**20, "has shape"),
        ("model.hidden_size", 9, "pca.mean has shape"),
        ("groups", 3, "groups.input is missing"),
        ("groups.middle", ..., "groups.middle is missing"),
        ("groups.middle", "wide", "groups.middle must be an object, got 'wide'"),
        ("groups.other", {}, "groups.'other' is not one of input, middle, output"),
        ("groups.input.width", 10**12, "groups.input.width must be a whole number"),
        ("groups.input.width", 2**19, "has shape"),
        ("groups.input.blocks", -1, "groups.input.blocks must be"),
        ("groups.input.blocks", 200, "is missing blocks of the networks input"),
        ("groups.input.gated", 1, "groups.input.gated must be true or false, got 1"),
        ("groups.input.dropout", float("nan"), "groups.input.dropout: expected a finite number"),
        ("groups.input.learning_rate", float("inf"), "groups.input.learning_rate: expected a finite number"),
        ("groups.input.noise", ..., "groups.input.noise is missing"),
        ("groups.input.speed", 1, "groups.input.speed is not expected"),
        ("checksums", [1], "checksums must be"),
        ("checksums", {"x": -1}, "checksums must be"),
        ("checksums", {}, "checksums differ"),
        ("format", 2, "expected format 3, got 2; train it again"),
        ("format", "3" * 9999, "expected format 3"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_named(folder, path, value, message):
    edit(folder, path, value)
    assert message in refusal(folder)


def test_all_that_is_wrong_is_said_at_once(folder):
    edit(folder, "look_ahead", -1)
    edit(folder, "groups.input.width", "wide")
    edit(folder, "model.family", 3)
    message = refusal(folder)
    for part in ("look_ahead", "groups.input.width", "family"):
        assert part in message


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe{\x00}\x00", b"nul"], ids=len)
def test_settings_that_are_no_json_are_refused(folder, content):
    (folder / "predictor.json").write_bytes(content)
    refusal(folder)


def test_every_flipped_bit_of_the_weights_is_noticed(folder):
    file = folder / "predictor.safetensors"
    whole = file.read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.integers(0, len(whole), 60):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << int(rng.integers(8))
        file.write_bytes(flipped)
        refusal(folder)


def test_the_damaged_arrays_are_named(folder):
    file = folder / "predictor.safetensors"
    kept = load_file(file)
    kept["middle.output.weight"] = kept["middle.output.weight"].copy()
    kept["middle.output.weight"].reshape(-1)[5] ^= 1
    save_file(kept, file)
    assert refusal(folder).endswith("damaged (checksums differ): middle.output.weight; copy it again")


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_what_was_cut_off_is_refused(folder, size):
    file = folder / "predictor.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    assert "expected safetensors" in refusal(folder)


@pytest.mark.parametrize("name", ["predictor.json", "predictor.safetensors"])
def test_missing_files_are_named(folder, name):
    (folder / name).unlink()
    assert name in refusal(folder)
    (folder / name).mkdir()
    refusal(folder)


def unsigned(folder, change):
    """The folder with other arrays, as of a time before there were checksums."""
    arrays = load_file(folder / "predictor.safetensors")
    change(arrays)
    save_file(arrays, folder / "predictor.safetensors")
    edit(folder, "checksums", ...)


def test_an_old_folder_is_read_with_a_warning(folder):
    unsigned(folder, lambda arrays: None)
    with pytest.warns(UserWarning, match="has no checksums, so damage would not be noticed; `save` it again"):
        found = LLaPor.load(folder)
    found.save(folder)
    with warnings.catch_warnings(action="error"):
        LLaPor.load(folder)


@pytest.mark.filterwarnings("ignore:.*has no checksums")
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("input.output.bias", np.nan, "input.output.bias not finite"),
        ("input.input.weight.scale", np.inf, "input.input.weight not finite"),
        ("pca.variance", None, "pca.variance"),
        ("pca.mean", None, "pca.mean has shape None"),
    ],
)
def test_arrays_that_cannot_be_used_are_named(folder, name, value, message):
    def change(arrays):
        if value is None:
            del arrays[name]
        else:
            arrays[name] = np.full_like(arrays[name], value)

    unsigned(folder, change)
    assert message in refusal(folder)


@pytest.mark.filterwarnings("ignore:.*has no checksums")
@pytest.mark.parametrize("shape", [(), (3,), (4, 8, 8, 2)], ids=str)
@pytest.mark.parametrize("name", ["pca.mean", "pca.variance", "pca.components", "input.gain"])
def test_arrays_of_other_shapes_are_named(folder, name, shape):
    unsigned(folder, lambda arrays: arrays.update({name: np.ones(shape, np.float16)}))
    assert name in refusal(folder)


def test_the_shipped_one_has_checksums():
    with warnings.catch_warnings(action="error"):
        predictor.shipped()


def cut(file):
    file.write_bytes(file.read_bytes()[:-9])


def flip(file):
    content = bytearray(file.read_bytes())
    content[-7] ^= 4
    file.write_bytes(content)


def change(name, array):
    def spoil(file):
        save_file(load_file(file) | {name: array}, file)

    return spoil


@pytest.mark.parametrize("spoil", [cut, flip, change("share", np.ones(3))], ids=["cut", "flipped", "changed"])
def test_damaged_baselines_are_refused(tmp_path, spoil):
    file = tmp_path / fitted.FILE
    file.write_bytes((predictor.SHIPPED / fitted.FILE).read_bytes())
    fitted._read(file)
    spoil(file)
    with pytest.raises(
        ValueError, match=r"baselines\.safetensors: expected fitted baselines, got .*; delete it"
    ):
        fitted._read(file)


@pytest.mark.parametrize(
    ("kind", "spoil"),
    [
        (Basis, cut),
        (Basis, change("mean", np.ones((4, 9), np.float32))),
        (Basis, change("mean", np.array(1, np.float32))),
        (Basis, change("variance", np.full((4, 8), np.nan, np.float32))),
        (Basis, change("components", np.ones((4, 8, 0), np.float32))),
        (Routers, cut),
        (Routers, change("scale", np.ones((4, 9), np.float32))),
        (Routers, change("weight", np.full((4, 8, 8), np.inf, np.float32))),
        (Routers, change("other", np.ones(1))),
    ],
)
def test_damaged_parts_of_a_trace_are_refused(made, tmp_path, kind, spoil):
    kind.load(made.parent / "trace").save(tmp_path)
    kind.load(tmp_path)
    (file,) = tmp_path.iterdir()
    spoil(file)
    with pytest.raises(ValueError, match=rf"{file.name}: expected .*; record it anew"):
        kind.load(tmp_path)
