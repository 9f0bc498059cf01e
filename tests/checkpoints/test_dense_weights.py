"""Packed dense layers on their way from and to folders."""

import jax
import numpy as np
import pytest
from helpers import SMALLEST, random_decoder
from safetensors.numpy import load_file

from layerscope_jax import load, save
from layerscope_jax.checkpoints.convert import convert
from layerscope_jax.checkpoints.identity import weights_digest
from layerscope_jax.checkpoints.parameters import int8_saves
from layerscope_jax.runtime.non_finite import bad_tensors

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "source"
    save(random_decoder(SMALLEST), folder, dtype="bfloat16")
    return folder


def test_loading_packing_and_converting_give_the_same(source, tmp_path):
    model, plain = load(source, dense_format="int8"), load(source)
    convert(source, tmp_path / "out", experts="int8", dense="int8")
    converted = load(tmp_path / "out")
    assert (plain.dense_format, model.dense_format, converted.dense_format) == (None, "int8", "int8")
    assert converted.bank.format.name == "int8"
    assert plain.dense_bytes - model.dense_bytes == int8_saves(SMALLEST, 2)
    for other in (plain.with_dense_format("int8"), converted):
        jax.tree.map(np.testing.assert_array_equal, other.dense, model.dense)
    assert weights_digest(model) != weights_digest(plain)
    assert list(bad_tensors(model)) == []
    assert load(tmp_path / "out", dense_format="int8").dense_bytes == model.dense_bytes
    convert(source, tmp_path / "plain")
    with pytest.raises(
        ValueError, match=r"dense layers in bfloat16 .* leave dtype, format and dense_format out"
    ):
        load(tmp_path / "plain", dense_format="int8")


def test_what_is_saved_is_unpacked(source, tmp_path):
    model = load(source, dense_format="int8")
    save(model, tmp_path)
    saved, stored = load_file(tmp_path / "model.safetensors"), load_file(source / "model.safetensors")
    assert {name: array.shape for name, array in saved.items()} == {
        name: array.shape for name, array in stored.items()
    }
    np.testing.assert_array_equal(saved["lm_head.weight"], np.asarray(model.dense["head"].values()))
    again = load(tmp_path, dense_format="int8")
    np.testing.assert_array_equal(again.dense["head"].codes, model.dense["head"].codes)


def test_formats_that_are_none_are_refused(source, tmp_path):
    for call in (
        lambda: load(source, dense_format="int4"),
        lambda: load(source).with_dense_format("fp8"),
    ):
        with pytest.raises(ValueError, match=r"dense_format must be 'int8' or None, got '(int4|fp8)'"):
            call()
    with pytest.raises(ValueError, match="dense must be 'int8' or None, got 'int4'"):
        convert(source, tmp_path / "out", dense="int4")
    with pytest.raises(ValueError, match="dense must be left out for a Hugging Face folder"):
        convert(source, tmp_path / "out", to="hf", dense="int8")
