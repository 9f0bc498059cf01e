"""`convert`: the engine's own layout has a checkpoint's bits, and a failure leaves nothing that loads."""

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import SMALLEST as CONFIG
from helpers import random_decoder
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import load_file

from layerscope_jax import formats, load, save
from layerscope_jax.checkpoints import convert as converting
from layerscope_jax.checkpoints.convert import convert
from layerscope_jax.checkpoints.converted import place_of
from layerscope_jax.checkpoints.converted_writer import Writer
from layerscope_jax.checkpoints.dense_weights import named_arrays
from layerscope_jax.checkpoints.fingerprint import fingerprint
from layerscope_jax.cli import main as cli
from layerscope_jax.support import folders

pytestmark = pytest.mark.usefixtures("quick_compiles")

FORMAT_FILE = Path(__file__).parents[2] / "examples" / "extend" / "format.py"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("convert") / "source"
    save(random_decoder(CONFIG), folder, dtype="bfloat16")
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def float8():
    """The name of a format that is registered by the example alone, for these tests."""
    known = dict(formats._formats)
    formats._formats.pop("float8_e4m3", None)  # other tests import the example as another module
    spec = importlib.util.spec_from_file_location("converted_format", FORMAT_FILE)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module.FLOAT8.name
    del sys.modules[spec.name]
    formats._formats.clear()
    formats._formats.update(known)


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    """To be copied before it is changed."""
    out = tmp_path_factory.mktemp("converted") / "out"
    convert(source, out)
    return out


def same(model, expected):
    assert model.config == expected.config
    assert model.bank.format == expected.bank.format
    assert model.bank.dtype == expected.bank.dtype
    jax.tree.map(np.testing.assert_array_equal, model.dense, expected.dense)
    for expert in expected.bank:
        for array, other in zip(model.bank.views(expert), expected.bank.views(expert), strict=True):
            assert array.dtype == other.dtype
            np.testing.assert_array_equal(array.view(np.uint8), other.view(np.uint8))


@pytest.mark.parametrize("experts", [None, "float16", "float8_e4m3"])
def test_what_is_converted_is_what_load_makes_of_the_source(source, tmp_path, float8, experts):
    convert(source, tmp_path / "out", experts=experts)
    model = load(tmp_path / "out")
    same(model, load(source, format=experts))
    kinds = {array.sharding.memory_kind for expert in model.bank for array in model.bank[expert]}
    assert kinds == {"pinned_host"}
    assert {array.sharding.memory_kind for array in jax.tree.leaves(model.dense)} == {"device"}
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == "{}"
    assert fingerprint(tmp_path / "out") != fingerprint(source)


def test_orbax_restores_what_was_written(source, converted):
    model = load(source)
    experts = ocp.load(converted / place_of(1))
    for expert, down in enumerate(experts["down"]):
        np.testing.assert_array_equal(down, model.bank.layers[1][expert].down)
    dense = ocp.load(converted / "dense")
    assert dense.keys() == {name for name, _ in named_arrays(model.dense)}
    for name, array in named_arrays(model.dense):
        np.testing.assert_array_equal(dense[name], array)


def test_back_as_a_hugging_face_folder_every_tensor_has_its_bits(source, converted, tmp_path):
    for number, folder in enumerate((source, converted)):
        out = tmp_path / str(number)
        convert(folder, out, to="hf")
        expected, got = (load_file(each / "model.safetensors") for each in (source, out))
        assert got.keys() == expected.keys()
        for name, array in expected.items():
            assert got[name].dtype == array.dtype
            np.testing.assert_array_equal(got[name].view(np.uint16), array.view(np.uint16))
        assert json.loads((out / "config.json").read_text()) == json.loads(
            (source / "config.json").read_text()
        )


@pytest.mark.parametrize(
    ("error", "words"),
    [(KeyboardInterrupt, None), (OSError(28, "No space"), "No space.* make room")],
)
def test_a_failure_half_way_leaves_nothing(source, tmp_path, monkeypatch, error, words):
    layer = Writer.layer

    def failing(writer, number, *others):
        if number == 1:
            raise error
        layer(writer, number, *others)

    monkeypatch.setattr(Writer, "layer", failing)
    with pytest.raises((KeyboardInterrupt, ValueError), match=words):
        convert(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    # A kill leaves the temporary folder behind.
    monkeypatch.setattr(folders.shutil, "rmtree", lambda *arguments, **settings: None)
    with pytest.raises((KeyboardInterrupt, ValueError)):
        convert(source, tmp_path / "out")
    (left,) = tmp_path.iterdir()
    assert (left / place_of(0)).is_dir()
    with pytest.raises(ValueError, match="found neither"):
        load(left)


def test_a_disk_without_room_is_refused_before_anything_is_written(source, tmp_path, monkeypatch):
    monkeypatch.setattr(converting.shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(ValueError, match=r"out: the checkpoint takes [\d,]+ bytes, and .* has 1 left"):
        convert(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_orbax_cannot_write_is_said(source, tmp_path, monkeypatch):
    def full(*arguments):
        raise ValueError("RESOURCE_EXHAUSTED: " + "a/" * 500 + "d: No space left [os_error_code='28']")

    monkeypatch.setattr("orbax.checkpoint.v1.save", full)
    with pytest.raises(ValueError, match=r"cannot write .*out: .*No space left on device: 'dense'; choose"):
        convert(source, tmp_path / "out")


def test_what_cannot_be_converted_is_refused(source, converted, tmp_path):
    with pytest.raises(ValueError, match="expected a folder that does not exist yet"):
        convert(source, source)
    with pytest.raises(ValueError, match="experts must be left out for a Hugging Face folder"):
        convert(source, tmp_path / "out", to="hf", experts="float16")
    with pytest.raises(ValueError, match="convert the checkpoint that it was made from"):
        convert(converted, tmp_path / "out")
    with pytest.raises(ValueError, match="expected one of the formats"):
        convert(source, tmp_path / "out", experts="int3")
    assert not (tmp_path / "out").exists()
    with pytest.raises(
        ValueError,
        match="converted to experts in bfloat16, dense layers in bfloat16 and other weights in bfloat16",
    ):
        load(converted, dtype="float32")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 1}, "expected version 2, got 1; convert the checkpoint again"),
        ({"format": "int3"}, "format: expected one of the formats"),
        ({"dtype": 3}, "dtype must be text"),
        ({"dense": "int4"}, "dense must be 'int8' or None, got 'int4'"),
    ],
)
def test_a_manifest_that_cannot_be_followed_is_named(converted, tmp_path, changes, words):
    folder = shutil.copytree(converted, tmp_path / "changed")
    file = folder / "layerscope.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=rf"layerscope\.json.*{words}"):
        load(folder)


def damaged(zarr):
    (zarr / "zarr.json").write_text(json.dumps({"shape": [1], "data_type": "int8"}))


def cut(zarr):
    file = zarr / "c" / "0" / "0" / "0"
    os.truncate(file, file.stat().st_size - 1)


def grown(zarr):
    file = zarr / "c" / "0" / "0" / "0"
    file.write_bytes(b"0" * 8 + file.read_bytes()[8:-20] + b"0" * 20)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            shutil.rmtree,
            r"up: expected an array, zarr\.json and its numbers, found none; convert the checkpoint again",
        ),
        (damaged, r"up/zarr\.json: expected .*'bfloat16'.*, got .*'int8'.*; convert the checkpoint again"),
        (lambda zarr: shutil.rmtree(zarr / "c"), r"up: expected an array, zarr\.json and its numbers"),
        (cut, r"up/c/0/0/0: expected 3,072 bytes of numbers and their index, .* 3,091 bytes; convert"),
        (grown, r"up/c/0/0/0: expected 3,072 bytes of numbers and their index"),
    ],
)
def test_arrays_that_are_gone_or_changed_are_named(converted, tmp_path, change, words):
    folder = shutil.copytree(converted, tmp_path / "changed")
    change(folder / place_of(1) / "state" / "up")
    with pytest.raises(ValueError, match=words):
        load(folder)


def test_the_command_converts_and_says_where_to(source, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = Path("new/out")
    assert cli.main(["convert", str(source), "--out", str(out), "--expert-format", "float16"]) == 0
    assert f"The checkpoint is in {out}" in capsys.readouterr().out
    assert load(out).bank.format.name == "float16"
    assert cli.main(["convert", str(source), "--out", str(out)]) == 2
    assert "does not exist yet; remove it or name another" in capsys.readouterr().err


def test_without_orbax_everything_loads_and_nothing_is_written(source, converted, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    same(load(converted), load(source))
    with pytest.raises(ValueError, match=r"written by Orbax, which is not installed: pip install"):
        convert(source, tmp_path / "out")
