"""Packed weights written out: bit for bit what their encoding says, by loops for this CPU and for any."""

import functools

import ml_dtypes
import numpy as np
import pytest
from helpers import bits
from hypothesis import given, settings
from hypothesis import strategies as st

from layerscope_jax.formats import format_named
from layerscope_jax.kernels import decoding
from layerscope_jax.kernels.decoding import decode_anywhere, prepare_matrix
from layerscope_jax.kernels.encodings import APART, CHUNK, CODE, DEPTH, MATRIX, ROOM, SPAN, facts_of
from layerscope_jax.kernels.scales import prepare_rows

FORMATS = ["int8", "int4", "int4-g128-bfloat16", "int4-g64-float16-zeros", "int4-g32-bfloat16-zeros"]
FORMATS += ["mxfp4", "nvfp4", "fp8", "fp8-channel", "fp8-tensor", "fp8-24x96", "fp8-64x64"]
ROWS, COLUMNS = 130, 384
WAYS = {decode_anywhere: prepare_rows, decoding.decode: decoding.prepare}
"""How weights are written out, and their scales found before."""

KINDS = {
    "float32": np.zeros(1, np.float32),
    "bfloat16": np.zeros(1, np.uint16),
    "widened": np.zeros(1, np.uint32),
}
"""An array of the type that is written, where "widened" is bfloat16 as float32: one of another rank would be
compiled for anew."""


@functools.cache
def packed(name):
    """A matrix's arrays, and the float32 numbers that they stand for; large and tiny ones among them."""
    rng = np.random.default_rng(1)
    sizes = np.repeat(10.0 ** rng.integers(-6, 4, (ROWS, COLUMNS // CHUNK)), CHUNK, 1)
    matrix = rng.standard_normal((ROWS, COLUMNS)) * sizes
    encoding = format_named(name).encoding
    arrays = encoding.pack(matrix.astype(np.float32))
    return arrays, np.asarray(encoding.values(arrays))


def matrix_of(name):
    arrays, _ = packed(name)
    matrix = np.zeros(MATRIX, np.int64)
    matrix[: len(arrays)] = [array.ctypes.data for array in arrays]
    matrix[DEPTH], matrix[CODE:] = COLUMNS, facts_of(format_named(name), ROWS, COLUMNS)
    return matrix


def decoded(by, name, dtype, first, rows, begin, chunks):
    matrix, room = matrix_of(name), np.zeros(2 * ROOM + APART * rows, np.uint8)
    kind = KINDS[dtype]
    result = np.zeros((rows, chunks, CHUNK), kind.dtype)
    prepare_matrix(matrix, room.ctypes.data, kind)
    k, to = CHUNK * begin, result.ctypes.data
    scales = WAYS[by](matrix, first, rows, k, chunks, room.ctypes.data + ROOM, kind)
    by(matrix, first, rows, k, chunks, scales, to, *result.strides[:2], to, 0, kind)
    return result.reshape(rows, -1)


def as_written(numbers, result, dtype):
    """Float32 numbers rounded as they were to be written, and what was written, as numbers too."""
    if dtype == "float32":
        return numbers, result
    numbers = numbers.astype(ml_dtypes.bfloat16)
    if dtype == "bfloat16":
        return numbers, result.view(ml_dtypes.bfloat16)
    return numbers.astype(np.float32), result.view(np.float32)


@pytest.mark.parametrize("by", WAYS, ids=lambda function: function.__name__)
@pytest.mark.parametrize("name", FORMATS)
@given(data=st.data())
@settings(deadline=None, max_examples=15)
def test_any_part_of_a_matrix_is_what_its_encoding_says(by, name, data):
    first = data.draw(st.integers(0, ROWS - 1))
    rows = data.draw(st.integers(1, min(40, ROWS - first)))
    begin = data.draw(st.integers(0, COLUMNS // CHUNK - 1))
    chunks = data.draw(st.integers(1, min(SPAN, COLUMNS // CHUNK - begin)))
    dtype = data.draw(st.sampled_from(sorted(KINDS)))
    part = packed(name)[1][first : first + rows, CHUNK * begin : CHUNK * (begin + chunks)]
    result = decoded(by, name, dtype, first, rows, begin, chunks)
    part, result = as_written(np.ascontiguousarray(part), result, dtype)
    np.testing.assert_array_equal(bits(result), bits(part))


@pytest.mark.parametrize("by", WAYS, ids=lambda function: function.__name__)
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("name", ["fp8-tensor", "mxfp4", "nvfp4", "int4"])
def test_every_code_and_scale_is_what_the_encoding_says(by, name, dtype):
    check_every_code(by, name, dtype)


def check_every_code(by, name, dtype):
    """Also those of numbers that are none."""
    rng = np.random.default_rng(2)
    encoding = format_named(name).encoding
    arrays = [
        rng.integers(0, 256, (*shape[:-1], shape[-1] * np.dtype(kind).itemsize), np.uint8).view(kind)
        for shape, kind in encoding.arrays(ROWS, COLUMNS)
    ]
    if name in ("fp8-tensor", "nvfp4"):
        arrays[-1][:] = 0.75
    with np.errstate(invalid="ignore", over="ignore"):
        expected = np.asarray(encoding.values(arrays))
        matrix = matrix_of(name)
        matrix[: len(arrays)] = [array.ctypes.data for array in arrays]
        kind, room = KINDS[dtype], np.zeros(2 * ROOM + APART * ROWS, np.uint8)
        result = np.zeros((ROWS, COLUMNS), kind.dtype)
        prepare_matrix(matrix, room.ctypes.data, kind)
        chunks = COLUMNS // CHUNK
        scales = WAYS[by](matrix, 0, ROWS, 0, chunks, room.ctypes.data + ROOM, kind)
        apart = result.strides[0] // chunks
        by(matrix, 0, ROWS, 0, chunks, scales, result.ctypes.data, result.strides[0], apart, 0, 0, kind)
        expected, result = as_written(expected, result, dtype)
    nothing = np.isnan(expected.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(result.astype(np.float32)), nothing)
    np.testing.assert_array_equal(bits(result)[~nothing], bits(expected)[~nothing])


@functools.cache
def integers():
    """Every code of 8 bits, in long rows, by scales of all sizes: arrays, and what they stand for."""
    rng, encoding = np.random.default_rng(2), format_named("int8").encoding
    codes, scales = encoding.pack(np.ones((40, SPAN * CHUNK), np.float32))
    codes = rng.integers(-128, 128, codes.shape).astype(np.asarray(codes).dtype)
    scales = (10.0 ** rng.uniform(-30, 30, np.shape(scales))).astype(np.float32)
    return (codes, scales), np.asarray(encoding.values((codes, scales)))


@pytest.mark.parametrize(("first", "rows"), [(0, 40), (3, 1), (39, 1), (5, 32)])
@pytest.mark.parametrize(("begin", "chunks"), [(0, SPAN), (2, 40), (0, 42), (1, 40), (0, 41), (24, 40)])
def test_long_rows_of_integers_are_looked_up_and_the_same(first, rows, begin, chunks):
    """Where tables pay, also from an odd chunk on, where they cannot be used."""
    arrays, values = integers()
    matrix = np.zeros(MATRIX, np.int64)
    matrix[: len(arrays)] = [array.ctypes.data for array in arrays]
    matrix[DEPTH], matrix[CODE:] = SPAN * CHUNK, facts_of(format_named("int8"), 40, SPAN * CHUNK)
    room, kind = np.zeros(2 * ROOM + APART * rows, np.uint8), KINDS["bfloat16"]
    result = np.zeros((rows, chunks, CHUNK), np.uint16)
    scales = decoding.prepare(matrix, first, rows, CHUNK * begin, chunks, room.ctypes.data, kind)
    to = result.ctypes.data
    decoding.decode(matrix, first, rows, CHUNK * begin, chunks, scales, to, *result.strides[:2], to, 0, kind)
    part = values[first : first + rows, CHUNK * begin : CHUNK * (begin + chunks)]
    expected = part.astype(ml_dtypes.bfloat16).view(np.uint16)
    np.testing.assert_array_equal(result.reshape(rows, -1), expected)
