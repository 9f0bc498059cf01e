"""Quantised checkpoints as published: experts stay packed, everything else is converted, bit for bit."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from exact_cases import agree, run
from flax.traverse_util import flatten_dict
from helpers import PROFILE, random_decoder
from hypothesis import given, settings
from hypothesis import strategies as st
from published_quantised import CODES, CONFIG, FIRST, FORMS, Q_PROJ, compressed, quantised
from safetensors.numpy import load_file

from layerscope_jax import Engine, OffloadConfig, load, save
from layerscope_jax.checkpoints.description import describe
from layerscope_jax.checkpoints.packed_tensors import PackedTensor
from layerscope_jax.checkpoints.quantised_tensors import put_together
from layerscope_jax.checkpoints.safetensors_io import StoredTensor
from layerscope_jax.models.quantisation import read_quantisation

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    save(random_decoder(CONFIG, dtype=jnp.bfloat16), folder)
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", FORMS)
def test_experts_are_kept_as_published_and_the_rest_is_converted(saved, tmp_path, name):
    expected = quantised(saved, tmp_path, name)
    model = load(tmp_path)
    assert (model.bank.format.name, model.bank.dtype) == (FORMS[name][2], jnp.bfloat16)
    for expert in model.bank:
        base = f"model.layers.{expert.layer}.mlp.experts.{expert.expert}."
        unpacked = model.bank.format.unpack(model.bank.format.Expert(*model.bank.views(expert)))
        for part, matrix in unpacked._asdict().items():
            np.testing.assert_array_equal(matrix, expected[f"{base}{part}_proj."])
    dense = flatten_dict(model.dense)
    converted = np.asarray(dense["layers", 1, "attention", "q", "weight"])
    np.testing.assert_array_equal(converted, expected[Q_PROJ].astype(jnp.bfloat16))
    kept = np.asarray(dense["layers", 0, "attention", "q", "weight"])
    np.testing.assert_array_equal(kept, saved[1][Q_PROJ.replace("1", "0") + "weight"])
    other = load(tmp_path, format="bfloat16")
    assert other.bank.format.name == "bfloat16"
    for expert in model.bank:
        for ours, theirs in zip(model.bank.unpacked(expert), other.bank[expert], strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_an_engine_runs_one(saved, tmp_path):
    quantised(saved, tmp_path, "int4")
    model, batches = load(tmp_path, dtype="float32"), [[[5, 20, 7], [17]]]
    with Engine(model) as engine:
        expected = run(engine, batches, 3)
    config = OffloadConfig(device_budget=5 * model.bank.expert_bytes, policy="lru", profile=PROFILE)
    with Engine(model, config) as engine:
        agree(run(engine, batches, 3), expected)
    with Engine(load(tmp_path, dtype="float32", format="float32")) as engine:
        _, logits = run(engine, batches, 3)
    np.testing.assert_allclose(expected[1][0], logits[0], rtol=1e-3, atol=1e-3)


def test_it_is_described_by_format_and_bytes(saved, tmp_path):
    quantised(saved, tmp_path, "int4")
    found = describe(tmp_path)
    assert (found.quantization, found.expert_format) == ("compressed-tensors", "int4-g32-bfloat16")
    assert found.expert_bytes == load(tmp_path).bank.expert_bytes
    packed = sum(
        tensor.nbytes // 4 + tensor.nbytes // 32 + 16
        for name, tensor in saved[1].items()
        if ".experts." in name
    )
    assert found.stored.bytes_by_part["routed experts"] == packed
    assert found.stored.tensors["I32"] == 2 * 4 * 3 + 1


def test_what_config_json_tells_is_described_without_weights(saved, tmp_path):
    raw, _ = saved
    for said, name in (
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "awq", "bits": 4}, "bfloat16"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(raw | {"quantization_config": said}))
        assert describe(tmp_path).expert_format == name


def test_modelopt_may_say_it_in_a_file_of_its_own(saved, tmp_path):
    quantised(saved, tmp_path, "nvfp4 modelopt")
    (tmp_path / "config.json").write_text(json.dumps(saved[0]))
    with pytest.raises(ValueError, match="weight_scale_2: expected no such tensor"):
        load(tmp_path)
    said = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(said))
    assert load(tmp_path).bank.format.name == "nvfp4"


def wrong(key, value):
    def change(tensors):
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value(tensors[key])

    return change


@pytest.mark.parametrize(
    ("name", "key", "value", "words"),
    [
        ("fp8", FIRST + "weight_scale_inv", None, "weight_scale_inv or weight_scale: expected the scales"),
        ("fp8", FIRST + "weight_scale_inv", lambda t: t[0, 0:0], "expected a scale for each block, row"),
        ("fp8 rows", FIRST + "weight_scale", lambda t: t[:-1], "blocks that cover 96 numbers, found 95"),
        ("int8", FIRST + "weight_scale", lambda t: t[:-1], r"weight_scale: expected shape \[96, 1\], found"),
        ("int4", FIRST + "weight_packed", lambda t: t[:, :-1], "groups of a multiple of 32 numbers"),
        ("int4", FIRST + "weight_scale", lambda t: t[:-1], r"weight_scale: expected shape \[96, 2\]"),
        (
            "int4",
            FIRST + "weight_scale",
            lambda t: t.astype(np.float32),
            "expected dtype F16, BF16, found F32",
        ),
        ("int4 zeros", FIRST + "weight_zero_point", lambda t: t[:-1], r"expected shape \[12, 2\], found"),
        ("gptq", FIRST + "qzeros", None, "qzeros: found no such tensor"),
        ("gptq", FIRST + "g_idx", lambda t: t[::-1].copy(), "found others .desc_act or actorder.; use"),
        ("gptq", FIRST + "qzeros", lambda t: t + 1, "the zero point 8 alone, since config.json says sym"),
        ("awq", FIRST + "scales", lambda t: t[:, :-1], r"scales: expected shape \[2, 96\]"),
        ("nvfp4", FIRST + "weight_global_scale", None, "weight_global_scale: found no such tensor"),
        ("nvfp4", FIRST + "weight_scale", lambda t: t[:, :-1], r"expected shape \[96, 4\]"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(saved, tmp_path, name, key, value, words):
    quantised(saved, tmp_path, name, wrong(key, value))
    with pytest.raises(ValueError, match=words) as raised:
        load(tmp_path)
    assert str(tmp_path) in str(raised.value)
    assert key.rpartition(".")[0] in str(raised.value)


@given(data=st.data())
@settings(deadline=None)
def test_tensors_of_any_shape_and_dtype_are_put_together_or_refused(data):
    name = data.draw(st.sampled_from(sorted(FORMS)))
    pack, said, _ = FORMS[name]
    parts, _ = pack(np.random.default_rng(0), 64, 64)
    stored = {}
    for part, array in parts.items():
        shape = data.draw(st.just(array.shape) | st.lists(st.integers(0, 65), max_size=4).map(tuple), part)
        dtype = data.draw(st.just(CODES[array.dtype.name]) | st.sampled_from(["F64", "I16", *CODES.values()]))
        stored["x." + part] = StoredTensor(Path("x"), dtype, shape, 0, 1, ())
    for part in data.draw(st.sets(st.sampled_from(sorted(stored)))) if data.draw(st.booleans()) else ():
        del stored[part]
    put, refusal = {}, "checkpoint: 1 quantised weights ("
    try:
        put = put_together(Path("checkpoint"), {"quantization_config": said}, stored)
    except ValueError as error:
        refusal = str(error)
    assert refusal.startswith("checkpoint: 1 quantised weights (")
    for tensor in put.values():
        if isinstance(tensor, PackedTensor):
            rows, columns = tensor.shape
            assert tensor.encoding.arrays(rows, columns)


def reorder(tensors):
    for key in tensors:
        if key.endswith("g_idx"):
            tensors[key] = tensors[key][::-1].copy()


def test_everything_that_does_not_fit_is_said_at_once(saved, tmp_path):
    def change(tensors):
        for key in [key for key in tensors if key.endswith("down_proj.weight_scale")]:
            del tensors[key]

    quantised(saved, tmp_path, "gptq", reorder, desc_act=True)
    with pytest.raises(ValueError, match=r"(?s)25 quantised weights .gptq. are not .* found others"):
        load(tmp_path)
    quantised(saved, tmp_path, "int4", change)
    with pytest.raises(ValueError, match=r"8 quantised weights .compressed-tensors.") as raised:
        load(tmp_path)
    assert str(raised.value).count("down_proj.weight_scale: expected the scales") == 8


def test_experts_of_several_formats_are_refused_unless_one_is_chosen(saved, tmp_path):
    def change(tensors):
        for part in ("weight_packed", "weight_scale", "weight_shape"):
            del tensors[FIRST + part]
        tensors[FIRST + "weight"] = saved[1][FIRST + "weight"]

    quantised(saved, tmp_path, "int4", change)
    words = (
        r"in one format, found .*floats \(1, such as .*experts\.0\.gate_proj\.weight\).* choose the format"
    )
    with pytest.raises(ValueError, match=words):
        load(tmp_path)
    assert load(tmp_path, format="int8").bank.format.name == "int8"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"quant_method": "bitsandbytes"}, "expected one of awq, compressed-tensors, .* got 'bitsandbytes'"),
        ("fp8", "quant_method: expected one of .* got 'fp8'"),
        ({"quant_method": "gptq", "bits": 8}, "bits: expected 4, got 8"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version: expected 'gemm', got 'gemv'"),
        ({"quant_method": "fp8", "fmt": "e5m2", "weight_block_size": [0]}, "weight_block_size: .*; .*fmt: "),
        ({"quant_method": "modelopt", "quant_algo": "W8A8"}, "quant_algo: expected 'nvfp4' or 'fp8'"),
        (compressed(2, "int"), "config_groups.group_0: expected int of 4 bits, .*, got"),
    ],
)
def test_what_config_json_says_is_refused_by_name(given, words):
    with pytest.raises(ValueError, match=words):
        read_quantisation(given)


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists)
    | st.dictionaries(
        st.sampled_from(["quant_method", "bits", "config_groups", "weight_block_size", "fmt", "sym"]),
        st.sampled_from(
            ["gptq", "fp8", "compressed-tensors", 4, None, [1, 2], {"a": 1}, {"a": {"weights": 3}}]
        ),
    )
)
@settings(deadline=None, max_examples=40)
def test_any_config_is_read_or_refused_in_words(given):
    """Never a failure that looks like one of ours."""
    try:
        said = read_quantisation(given)
    except ValueError as error:
        message = str(error)
    else:
        message = "quantization_config."
        assert (said is None) == (given is None)
    assert "quantization_config." in message
