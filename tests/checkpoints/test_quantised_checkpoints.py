"""Checkpoints that are published quantised: experts stay packed, everything else is converted, bit for bit.

Each form is written here by itself, number by number, from the description of the form.
"""

import json
from dataclasses import replace

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from exact_cases import agree, run
from flax.traverse_util import flatten_dict
from helpers import PROFILE, TINY, random_decoder
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from layerscope_jax import Engine, OffloadConfig, load, save
from layerscope_jax.checkpoints.description import describe
from layerscope_jax.models.quantisation import read_quantisation

pytestmark = pytest.mark.usefixtures("quick_compiles")

CONFIG = replace(
    TINY, family="qwen3_moe", hidden_size=64, moe_intermediate_size=96, num_layers=2, num_experts=4
)
CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int32": "I32", "int64": "I64"}
CODES |= {"uint8": "U8", "int8": "I8", "float8_e4m3fn": "F8_E4M3", "float8_e8m0fnu": "F8_E8M0"}
FP4 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
Q_PROJ = "model.layers.1.self_attn.q_proj."
FIRST = "model.layers.0.mlp.experts.0.gate_proj."


def write(file, tensors):
    """A safetensors file, of dtypes that the package does not write."""
    header, data = {}, b""
    for name, array in tensors.items():
        start, data = len(data), data + array.tobytes()
        header[name] = {
            "dtype": CODES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [start, len(data)],
        }
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def word(codes):
    """Eight codes as an int32, the first in the lowest bits."""
    return sum(int(code) << 4 * place for place, code in enumerate(codes))


def words(rows):
    """Codes [..., 8 n] as int32 [..., n]."""
    flat = np.asarray(rows).reshape(-1, 8)
    return np.array([word(codes) for codes in flat], np.uint32).view(np.int32).reshape(*rows.shape[:-1], -1)


def spread(scales, group, axis=1):
    return np.repeat(np.asarray(scales, np.float32), group, axis=axis)


def normal(rng, shape, dtype):
    return (rng.uniform(0.5, 1.5, shape) * 0.05).astype(dtype)


def fp8(rng, n, k, block=(32, 32)):
    codes = rng.standard_normal((n, k)).astype(ml_dtypes.float8_e4m3fn)
    scale = normal(rng, (n // block[0], k // block[1]), np.float32)
    values = np.float32(codes) * spread(spread(scale, block[0], 0), block[1])
    return {"weight": codes, "weight_scale_inv": scale}, values


def fp8_powers(rng, n, k):
    codes = rng.standard_normal((n, k)).astype(ml_dtypes.float8_e4m3fn)
    powers = rng.integers(120, 125, (n, k // 32)).astype(np.uint8)
    values = np.float32(codes) * spread(2.0 ** (powers.astype(int) - 127), 32)
    return {"weight": codes, "weight_scale_inv": powers.view(ml_dtypes.float8_e8m0fnu)}, values


def fp8_rows(rng, n, k):
    codes = rng.standard_normal((n, k)).astype(ml_dtypes.float8_e4m3fn)
    scale = normal(rng, (n, 1), ml_dtypes.bfloat16)
    return {"weight": codes, "weight_scale": scale}, np.float32(codes) * np.float32(scale)


def fp8_whole(rng, n, k):
    codes = rng.standard_normal((n, k)).astype(ml_dtypes.float8_e4m3fn)
    scale = normal(rng, (), np.float32)
    more = {"input_scale": np.ones((), np.float32)}
    return {"weight": codes, "weight_scale": np.asarray(scale)} | more, np.float32(codes) * scale


def int8(rng, n, k):
    codes, scale = rng.integers(-127, 128, (n, k)).astype(np.int8), normal(rng, (n, 1), np.float32)
    return {"weight": codes, "weight_scale": scale}, np.float32(codes) * scale


def packed_int4(rng, n, k, zeros=False):
    codes, scale = rng.integers(-8, 8, (n, k)), normal(rng, (n, k // 32), ml_dtypes.bfloat16)
    tensors = {"weight_packed": words(codes + 8), "weight_scale": scale, "weight_shape": np.array([n, k])}
    points = np.zeros((n, k // 32), int)
    if zeros:
        points = rng.integers(-8, 8, (n, k // 32))
        tensors["weight_zero_point"] = np.ascontiguousarray(words((points + 8).T).T)
    return tensors, np.float32(codes - spread(points, 32)) * spread(scale, 32)


def packed_int4_zeros(rng, n, k):
    return packed_int4(rng, n, k, zeros=True)


def gptq(rng, n, k, sym=True, offset=1):
    codes, scale = rng.integers(0, 16, (n, k)), normal(rng, (n, k // 32), np.float16)
    points = np.full((n, k // 32), 8) if sym else rng.integers(1, 16, (n, k // 32))
    tensors = {
        "qweight": np.ascontiguousarray(words(codes).T),
        "qzeros": words((points - offset).T),
        "scales": np.ascontiguousarray(scale.T),
        "g_idx": np.arange(k, dtype=np.int32) // 32,
    }
    return tensors, np.float32(codes - spread(points, 32)) * spread(scale, 32)


def gptq_asymmetric(rng, n, k):
    return gptq(rng, n, k, sym=False)


def gptq_2(rng, n, k):
    return gptq(rng, n, k, sym=False, offset=0)


def awq(rng, n, k):
    def ordered(rows):  # a word holds the columns 0, 2, 4, 6, 1, 3, 5, 7
        return words(rows.reshape(len(rows), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].reshape(rows.shape))

    codes, points = rng.integers(0, 16, (n, k)), rng.integers(0, 16, (n, k // 32))
    scale = normal(rng, (n, k // 32), np.float16)
    tensors = {
        "qweight": ordered(np.ascontiguousarray(codes.T)),
        "qzeros": ordered(np.ascontiguousarray(points.T)),
        "scales": np.ascontiguousarray(scale.T),
    }
    return tensors, np.float32(codes - spread(points, 32)) * spread(scale, 32)


def nvfp4(rng, n, k, divides):
    codes = rng.integers(0, 16, (n, k))
    scale = rng.uniform(0.5, 100, (n, k // 16)).astype(ml_dtypes.float8_e4m3fn)
    whole = np.float32(2.0**-9)  # a power of two, so that its reciprocal is exact
    numbers = np.array(FP4, np.float32)[codes]
    pairs = (codes[:, ::2] + 16 * codes[:, 1::2]).astype(np.uint8)
    values = numbers * spread(np.float32(scale) * whole, 16)
    if divides:
        more = {"weight_global_scale": np.array([1 / whole], np.float32)}
        return {"weight_packed": pairs, "weight_scale": scale} | more, values
    more = {"weight_scale_2": np.array(whole, np.float32), "input_scale": np.ones((), np.float32)}
    return {"weight": pairs, "weight_scale": scale} | more, values


def nvfp4_packed(rng, n, k):
    return nvfp4(rng, n, k, divides=True)


def nvfp4_modelopt(rng, n, k):
    return nvfp4(rng, n, k, divides=False)


def compressed(bits, kind):
    return {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": bits}}}} | {
        "config_groups": {"group_0": {"weights": {"num_bits": bits, "type": kind}, "targets": ["Linear"]}},
        "ignore": ["lm_head"],
    }


FORMS = {
    "fp8": (fp8, {"quant_method": "fp8", "weight_block_size": [32, 32]}, "fp8-32x32"),
    "fp8 powers of two": (fp8_powers, {"quant_method": "fp8"}, "fp8-1x32"),
    "fp8 rows": (fp8_rows, compressed(8, "float"), "fp8-channel"),
    "fp8 whole": (fp8_whole, {"quant_method": "modelopt", "quant_algo": "FP8"}, "fp8-tensor"),
    "int8": (int8, compressed(8, "int"), "int8"),
    "int4": (packed_int4, compressed(4, "int"), "int4-g32-bfloat16"),
    "int4 zeros": (packed_int4_zeros, compressed(4, "int"), "int4-g32-bfloat16-zeros"),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "sym": True, "desc_act": False}, "int4"),
    "gptq zeros": (
        gptq_asymmetric,
        {"quant_method": "gptq", "bits": 4, "sym": False},
        "int4-g32-float16-zeros",
    ),
    "gptq 2": (
        gptq_2,
        {"quant_method": "gptq", "bits": 4, "sym": False, "checkpoint_format": "gptq_v2"},
        "int4-g32-float16-zeros",
    ),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "version": "gemm"}, "int4-g32-float16-zeros"),
    "nvfp4": (nvfp4_packed, compressed(4, "float"), "nvfp4"),
    "nvfp4 modelopt": (nvfp4_modelopt, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    save(random_decoder(CONFIG, dtype=jnp.bfloat16), folder)
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def quantised(saved, folder, name, change=lambda tensors: None, **said):
    """Writes a checkpoint in a form, in two files; returns the matrices that the packed ones stand for."""
    raw, tensors = saved
    pack, settings, _ = FORMS[name]
    rng, result, expected = np.random.default_rng(0), {}, {}
    for key, tensor in tensors.items():
        base = key.removesuffix("weight")
        if ".experts." not in key and base != Q_PROJ:
            result[key] = tensor
            continue
        parts, expected[base] = pack(rng, *tensor.shape)
        result |= {base + part: array for part, array in parts.items()}
    change(result)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": settings | said}))
    keys = list(result)
    files = {"a.safetensors": keys[::2], "b.safetensors": keys[1::2]}  # parts of a matrix in both
    for file, some in files.items():
        write(folder / file, {key: result[key] for key in some})
    index = {"weight_map": {key: file for file, some in files.items() for key in some}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return expected


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
