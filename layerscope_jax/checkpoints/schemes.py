"""How quantised matrices are published: which tensors belong to one, and what they are in a format of ours.

Sources: the integrations of transformers 5 (MXFP4, FP8), compressed-tensors, AutoGPTQ, AutoAWQ, and NVIDIA's
ModelOpt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from layerscope_jax.checkpoints.packed_tensors import Convert
from layerscope_jax.checkpoints.safetensors_io import StoredTensor
from layerscope_jax.formats.encoding import Encoding, joined
from layerscope_jax.formats.fp8 import WHOLE, Fp8
from layerscope_jax.formats.int4 import MIDDLE, Int4
from layerscope_jax.formats.int8 import Int8
from layerscope_jax.formats.mxfp4 import GROUP, Mxfp4
from layerscope_jax.formats.nvfp4 import Nvfp4
from layerscope_jax.formats.small_floats import e8m0
from layerscope_jax.models.quantisation import Quantisation

Parts = Mapping[str, StoredTensor]
Made = tuple[Encoding, tuple[int, ...], Convert]
"""Encoding, shape of the matrix, and what makes the arrays of the one from the tensors of the other."""

BLOCKS = (128, 64, 32, 256, 512, 16)
"""Sizes of FP8 blocks, the likeliest first."""

FLOATS = ("F32", "BF16", "F16")
WORD = 8  # codes of 4 bits in an int32
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word of AWQ each of eight columns is."""


@dataclass(frozen=True)
class Scheme:
    """One way to publish a quantised matrix.

    Attributes:
        codes: what the name of the tensor with its codes ends with.
        dtype: of that tensor, by safetensors' name.
        scales: what the name of its scales ends with; of several, any.
        others: names of further tensors: True for those that it must have.
        weight: what the matrix's name ends with in a table of weights.
        make: from the tensors and config.json to the encoding; raises ValueError if they do not fit.
    """

    codes: str
    dtype: str
    scales: tuple[str, ...]
    others: Mapping[str, bool]
    weight: str
    make: Callable[[Parts, Quantisation], Made]


def expect_shape(name: str, tensor: StoredTensor, *shapes: tuple[int, ...]) -> None:
    """Refuses a tensor of another shape."""
    if tensor.shape not in shapes:
        raise ValueError(f"{name}: expected shape {list(shapes[0])}, found {list(tensor.shape)}")


def expect_dtype(name: str, tensor: StoredTensor, *dtypes: str) -> None:
    """Refuses a tensor of another dtype."""
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: expected dtype {', '.join(dtypes)}, found {tensor.dtype}")


def matrix_of(name: str, tensor: StoredTensor) -> tuple[int, int]:
    """Returns the sizes of a tensor that is a matrix."""
    if len(tensor.shape) != 2 or 0 in tensor.shape:
        raise ValueError(f"{name}: expected a matrix, found shape {list(tensor.shape)}")
    return tensor.shape[0], tensor.shape[1]


def floats(array: np.ndarray, dtype: str) -> np.ndarray:
    """Returns scales in float32, of a safetensors dtype."""
    return e8m0(array) if dtype in ("F8_E8M0", "U8") else np.asarray(array, np.float32)


def words(array: np.ndarray) -> np.ndarray:
    """Returns the 4-bit codes [..., 8] of int32 words, the lowest bits first."""
    pairs = np.ascontiguousarray(array).view(np.uint8).reshape(*array.shape, 4)
    return np.stack([pairs & np.uint8(15), pairs >> np.uint8(4)], axis=-1).reshape(*array.shape, WORD)


def _fp8(parts: Parts, said: Quantisation) -> Made:
    codes, (name, scale) = parts["weight"], _scale(parts)
    rows, columns = matrix_of("weight", codes)
    expect_dtype(name, scale, *FLOATS, "F8_E8M0", "U8")
    grid = scale.shape
    if scale.size and np.prod(grid, dtype=int) == 1 and (name != "weight_scale_inv" or said.block is None):
        encoding = Fp8(WHOLE, WHOLE)
    elif name != "weight_scale_inv" and grid in ((rows,), (rows, 1)):
        encoding = Fp8(1, WHOLE)
    elif len(grid) == 2:
        given = said.block or (0, 0)
        encoding = Fp8(
            block_size(name, rows, grid[0], given[0]), block_size(name, columns, grid[1], given[1])
        )
    else:
        raise ValueError(
            f"{name}: expected a scale for each block, row ([{rows}, 1]) or matrix, found shape {list(grid)}"
        )
    shape = encoding.arrays(rows, columns)[1].shape
    return (
        encoding,
        (rows, columns),
        lambda a: (a["weight"], floats(a[name], scale.dtype).reshape(shape)),
    )


def block_size(name: str, size: int, count: int, given: int) -> int:
    """Returns how long the blocks are of which `count` cover an axis: as given, if that fits, else the
    likeliest length.

    Raises:
        ValueError: if no length fits.

    >>> block_size("scale", 1408, 11, 0), block_size("scale", 96, 3, 128)
    (128, 32)
    """
    for block in (given, *BLOCKS, 1, -(-size // count) if count else 0):
        if block and -(-size // block) == count:
            return block
    raise ValueError(f"{name}: expected blocks that cover {size} numbers, found {count} of them")


def _scale(parts: Parts) -> tuple[str, StoredTensor]:
    return next((name, tensor) for name, tensor in parts.items() if "scale" in name)


def _int8(parts: Parts, said: Quantisation) -> Made:
    rows, columns = matrix_of("weight", parts["weight"])
    scale = parts["weight_scale"]
    expect_shape("weight_scale", scale, (rows, 1), (rows,))
    expect_dtype("weight_scale", scale, *FLOATS)
    return (
        Int8(),
        (rows, columns),
        lambda a: (a["weight"], np.asarray(a["weight_scale"], np.float32).reshape(rows)),
    )


def int4(name: str, scale: StoredTensor, groups: int, columns: int, zeros: bool = False) -> Int4:
    """Returns the encoding of rows of `columns` codes with `groups` scales."""
    dtypes = {"F16": "float16", "BF16": "bfloat16"}
    expect_dtype(name, scale, *dtypes)
    if not groups or columns % groups or columns // groups % 32:
        raise ValueError(
            f"{name}: expected groups of a multiple of 32 numbers, found {groups} for rows of {columns}"
        )
    return Int4(columns // groups, dtypes[scale.dtype], zeros)  # type: ignore[arg-type]


def _packed_int4(parts: Parts, said: Quantisation) -> Made:
    rows, count = matrix_of("weight_packed", parts["weight_packed"])
    scale, zero = parts["weight_scale"], parts.get("weight_zero_point")
    _, groups = matrix_of("weight_scale", scale)
    expect_shape("weight_scale", scale, (rows, groups))
    encoding = int4("weight_scale", scale, groups, count * WORD, zero is not None)
    if "weight_shape" in parts:
        expect_shape("weight_shape", parts["weight_shape"], (2,))
    if zero is not None:
        expect_shape("weight_zero_point", zero, (-(-rows // WORD), groups))
        expect_dtype("weight_zero_point", zero, "I32")

    def convert(a: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        refuse_order(a.get("weight_g_idx"), encoding.group)
        arrays = a["weight_packed"].view(np.uint8), a["weight_scale"]
        if zero is None:
            return arrays
        points = words(a["weight_zero_point"]).swapaxes(1, 2).reshape(-1, groups)
        return *arrays, np.ascontiguousarray(points[:rows])

    return encoding, (rows, count * WORD), convert


def _gptq(parts: Parts, said: Quantisation) -> Made:
    count, rows = matrix_of("qweight", parts["qweight"])
    groups, _ = matrix_of("scales", parts["scales"])
    expect_shape("scales", parts["scales"], (groups, rows))
    expect_shape("qzeros", parts["qzeros"], (groups, -(-rows // WORD)))
    expect_dtype("qzeros", parts["qzeros"], "I32")
    encoding = int4("scales", parts["scales"], groups, count * WORD, said.zeros)

    def convert(a: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        refuse_order(a.get("g_idx"), encoding.group)
        arrays = np.ascontiguousarray(a["qweight"].T).view(np.uint8), np.ascontiguousarray(a["scales"].T)
        zeros = words(a["qzeros"]).reshape(groups, -1)[:, :rows].T + np.uint8(said.zero_offset)
        if encoding.zeros:
            return *arrays, np.ascontiguousarray(zeros)
        if (zeros != MIDDLE).any():
            raise ValueError(
                f"qzeros: expected the zero point {MIDDLE} alone, since config.json says sym, found others; "
                "set quantization_config.sym to false if the weights are asymmetric"
            )
        return arrays

    return encoding, (rows, count * WORD), convert


def refuse_order(index: np.ndarray | None, group: int) -> None:
    """Refuses groups that are not of neighbours.

    Raises:
        ValueError: says what to use instead.
    """
    if index is not None and not np.array_equal(index, np.arange(len(index)) // group):
        raise ValueError(
            "g_idx: expected groups of neighbouring inputs, found others (desc_act or actorder); use a "
            "checkpoint that was quantised with desc_act false"
        )


def _awq(parts: Parts, said: Quantisation) -> Made:
    columns, count = matrix_of("qweight", parts["qweight"])
    groups, _ = matrix_of("scales", parts["scales"])
    expect_shape("scales", parts["scales"], (groups, count * WORD))
    zero = parts.get("qzeros")
    if zero is not None:
        expect_shape("qzeros", zero, (groups, count))
        expect_dtype("qzeros", zero, "I32")
    encoding = int4("scales", parts["scales"], groups, columns, zero is not None)

    def convert(a: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        codes = _awq_codes(a["qweight"])
        arrays = joined(np.ascontiguousarray(codes.T)), np.ascontiguousarray(a["scales"].T)
        return arrays if zero is None else (*arrays, np.ascontiguousarray(_awq_codes(a["qzeros"]).T))

    return encoding, (count * WORD, columns), convert


def _awq_codes(array: np.ndarray) -> np.ndarray:
    return words(array)[..., AWQ_ORDER].reshape(len(array), -1)


def _nvfp4(codes: str, whole: str, divides: bool) -> Callable[[Parts, Quantisation], Made]:
    def make(parts: Parts, said: Quantisation) -> Made:
        rows, half = matrix_of(codes, parts[codes])
        if half % 8:
            raise ValueError(f"{codes}: expected rows of a multiple of 16 numbers, found {2 * half}")
        expect_shape("weight_scale", parts["weight_scale"], (rows, half // 8))
        expect_dtype("weight_scale", parts["weight_scale"], "F8_E4M3")
        expect_shape(whole, parts[whole], (1,), ())
        expect_dtype(whole, parts[whole], "F32")

        def convert(a: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
            scale = a[whole].reshape(1)
            return a[codes], a["weight_scale"], np.float32(1) / scale if divides else scale

        return Nvfp4(), (rows, 2 * half), convert

    return make


def _mxfp4(parts: Parts, said: Quantisation) -> Made:
    blocks, scales = parts["blocks"], parts["scales"]
    if len(blocks.shape) != 4 or blocks.shape[3] != GROUP // 2:
        raise ValueError(
            f"blocks: expected shape [experts, outputs, inputs / 32, 16], found {list(blocks.shape)}"
        )
    experts, rows, groups, _ = blocks.shape
    expect_shape("scales", scales, (experts, rows, groups))
    expect_dtype("scales", scales, "U8")
    return (
        Mxfp4(),
        (experts, rows, GROUP * groups),
        lambda a: (a["blocks"].reshape(rows, -1), a["scales"]),
    )


def _scheme(
    codes: str, dtype: str, scales: Any, make: Any, weight: str = ".weight", **others: bool
) -> Scheme:
    return Scheme(codes, dtype, tuple(scales.split()), others, weight, make)


FP8 = _scheme(".weight", "F8_E4M3", "weight_scale_inv weight_scale", _fp8)
INT8 = _scheme(".weight", "I8", "weight_scale", _int8)
PACKED_INT4 = _scheme(
    ".weight_packed",
    "I32",
    "weight_scale",
    _packed_int4,
    weight_shape=False,
    weight_zero_point=False,
    weight_g_idx=False,
)
PACKED_NVFP4 = _scheme(
    ".weight_packed",
    "U8",
    "weight_scale",
    _nvfp4("weight_packed", "weight_global_scale", divides=True),
    weight_global_scale=True,
)
MODELOPT_NVFP4 = _scheme(
    ".weight", "U8", "weight_scale", _nvfp4("weight", "weight_scale_2", divides=False), weight_scale_2=True
)
GPTQ = _scheme(".qweight", "I32", "scales", _gptq, qzeros=True, g_idx=False)
AWQ = _scheme(".qweight", "I32", "scales", _awq, qzeros=False)
MXFP4 = _scheme("_blocks", "U8", "scales", _mxfp4, weight="_blocks")

SCHEMES: dict[str, tuple[Scheme, ...]] = {
    "awq": (AWQ,),
    "compressed-tensors": (PACKED_INT4, PACKED_NVFP4, FP8, INT8),
    "fp8": (FP8,),
    "gptq": (GPTQ,),
    "modelopt": (MODELOPT_NVFP4, FP8),
    "mxfp4": (MXFP4,),
}
"""By `quant_method`."""
