"""Checkpoints in the forms in which quantised weights are published, for tests.

Each form is written here by itself, number by number, from the description of the form.
"""

import json
from dataclasses import replace

import ml_dtypes
import numpy as np
from helpers import TINY

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
