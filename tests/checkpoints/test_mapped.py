"""Experts that are mapped from their files have the bits of experts that are read, wherever they lie."""

import gc
import os
import shutil

import jax
import numpy as np
import pytest
from helpers import SMALLEST as CONFIG
from helpers import random_decoder
from sharded import moved

from layerscope_jax import Engine, ExpertId, load, save
from layerscope_jax.checkpoints import model as loading

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mapped") / "model"
    save(random_decoder(CONFIG), folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy whose tensors begin 8 bytes after a multiple of 64, as in published files."""
    return moved(shutil.copytree(saved, tmp_path / "model"), 8)


def experts(model):
    return [view for expert in model.bank for view in model.bank.views(expert)]


@pytest.mark.parametrize(("place", "kind"), [(0, jax.Array), (8, np.ndarray), (1, jax.Array)])
def test_experts_have_the_same_bits_wherever_they_lie(folder, place, kind):
    """At a multiple of 64 JAX takes them over; at an odd place they are read."""
    moved(folder, place)
    model, read = load(folder), load(folder, mmap=False)
    assert {isinstance(array, kind) for expert in model.bank for array in model.bank[expert]} == {True}
    for array, expected in zip(experts(model), experts(read), strict=True):
        np.testing.assert_array_equal(array, expected)
        assert array.ctypes.data % 64 == (8 if place == 8 else 0)


@pytest.mark.parametrize("settings", [{"dtype": "bfloat16"}, {"format": "float32"}, {"mmap": False}])
def test_what_is_converted_or_not_to_be_mapped_is_read(folder, settings):
    model = load(folder, **settings)
    assert model.mapped is None
    assert isinstance(model.bank[ExpertId(0, 0)].gate, jax.Array)


def test_for_an_accelerator_experts_are_read(folder, monkeypatch):
    monkeypatch.setattr(loading, "on_cpu", lambda device: False)
    assert isinstance(load(folder).bank[ExpertId(0, 0)].gate, jax.Array)


def test_an_engine_refuses_a_model_whose_file_was_written_to(folder):
    model, file = load(folder), folder / "model.safetensors"
    content = file.read_bytes()
    expected = [view.copy() for view in experts(model)]
    (folder / "new").write_bytes(content[:-8])
    os.replace(folder / "new", file)  # the model keeps the old file
    for view, array in zip(experts(model), expected, strict=True):
        np.testing.assert_array_equal(view, array)
    model.mapped.check()
    file.write_bytes(content)
    model = load(folder)
    with file.open("r+b") as opened:
        opened.seek(len(content) - 1)
        opened.write(b"\0")
    os.utime(file, ns=(0, 0))
    with pytest.raises(ValueError, match=r"model\.safetensors was changed while a model was using it; "):
        Engine(model)


def test_files_are_closed_once_no_model_needs_them(folder):
    load(folder, mmap=False)  # whatever JAX opens for the first array
    gc.collect()  # models of other tests
    before = set(os.listdir("/proc/self/fd"))
    model = load(folder)
    assert len(os.listdir("/proc/self/fd")) > len(before)
    del model
    gc.collect()
    assert set(os.listdir("/proc/self/fd")) == before


def test_packing_a_mapped_model_leaves_nothing_mapped_in_the_bank(folder):
    packed = load(folder).with_format(loading.format_named("bfloat16"))
    assert packed.bank[ExpertId(1, 2)].down.sharding.memory_kind == "pinned_host"
    same = load(folder, format="bfloat16")
    for array, expected in zip(experts(packed), experts(same), strict=True):
        np.testing.assert_array_equal(array, expected)
