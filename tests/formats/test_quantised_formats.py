"""Quantised formats: what they pack they unpack, to a known error, and products are plain ones of that."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import bits
from hypothesis import given, settings
from hypothesis import strategies as st

from layerscope_jax.formats import encoding, format_named
from layerscope_jax.formats.encoding import joined, nibbles
from layerscope_jax.formats.small_floats import (
    E2M1_VALUES,
    E4M3_VALUES,
    e2m1,
    e2m1_codes,
    e4m3,
    e4m3_codes,
    e8m0,
)
from layerscope_jax.models.experts import SWIGLU, ExpertBody, ffn, weights_type

NAMES = (
    "int8",
    "int4",
    "int4-g64-bfloat16",
    "int4-g32-float16-zeros",
    "mxfp4",
    "fp8",
    "fp8-channel",
    "fp8-tensor",
    "fp8-8x32",
    "nvfp4",
)
BODIES = (SWIGLU, ExpertBody("gelu"), ExpertBody("gelu_tanh"), ExpertBody("clamped", bias=True))

WORST = {"int8": 1 / 250, "int4": 1 / 5, "mxfp4": 1 / 5, "fp8": 1 / 24, "nvfp4": 1 / 5}
"""The largest error of a number, as a share of the largest number that shares its scale."""


def encoding_of(name):
    return format_named(name).encoding


def matrices(body, width, hidden, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(hidden, width), (hidden, width), (width, hidden)]
    bias = [rng.standard_normal(2 * hidden + width).astype(jnp.bfloat16)] if body.bias else []
    return [(0.2 * rng.standard_normal(shape)).astype(jnp.bfloat16) for shape in shapes] + bias


@given(
    name=st.sampled_from(NAMES),
    rows=st.integers(1, 40),
    columns=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
    size=st.floats(1e-3, 1e3),
)
@settings(max_examples=60, deadline=None)
def test_what_is_packed_is_unpacked_with_a_small_error(name, rows, columns, seed, size):
    stored, rng = encoding_of(name), np.random.default_rng(seed)
    matrix = (size * rng.standard_normal((rows, 64 * columns))).astype(np.float32)
    matrix[rng.random(matrix.shape) < 0.1] = 0
    if seed % 3 == 0:
        matrix[0] = 0
    packed = stored.pack(matrix)
    buffers = stored.arrays(*matrix.shape)
    assert [(array.shape, array.dtype) for array in packed] == [tuple(buffer) for buffer in buffers]
    assert stored.shape(packed) == matrix.shape
    values = stored.values(packed)
    assert (values.dtype, values.shape) == (np.float32, matrix.shape)
    worst = WORST[name.split("-")[0]] * np.abs(matrix).max()
    assert np.abs(values - matrix).max() <= worst
    if not name.startswith("int4"):  # of int4, a searched scale may be another one the second time
        again = stored.values(stored.pack(values))
        np.testing.assert_allclose(again, values, rtol=1e-6, atol=1e-6 * worst)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["int8", "int4", "int4-g32-float16-zeros", "mxfp4", "fp8-8x32", "nvfp4"])
def test_an_expert_computes_what_its_unpacked_matrices_do(name, dtype):
    body = BODIES[NAMES.index(name) % len(BODIES)]
    format = format_named(name).for_body(body)
    packed = format.pack(*matrices(body, 64, 96))
    format.check(packed)
    assert format.sizes(packed) == (64, 96)
    assert format.expert_bytes(64, 96) == sum(array.nbytes for array in packed)
    unpacked = [jax.device_put(array.astype(jnp.dtype(dtype))) for array in format.unpack(packed)]
    x = jnp.asarray(np.random.default_rng(1).standard_normal((3, 64)), dtype)
    found = jax.jit(format.ffn)(x, jax.device_put(packed))
    expected = jax.jit(lambda x, weights: ffn(x, weights, body))(x, weights_type(body)(*unpacked))
    np.testing.assert_array_equal(bits(found), bits(expected))


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.activation)
def test_every_format_has_every_body(body):
    for name in NAMES:
        format = format_named(name).for_body(body)
        assert format is format_named(name).for_body(body)  # programs know a format's product by its object
        assert format.body == body
        packed = format.pack(*matrices(body, 64, 64))
        format.check(packed)
        *_, down = format.unpack(packed)[:3]
        assert down.shape == (64, 64)
        if body.bias:
            assert packed.bias.dtype == np.float32
            np.testing.assert_array_equal(packed.bias, np.float32(matrices(body, 64, 64)[-1]))


def test_int4_clips_where_that_is_closer():
    """Searching for a scale is worth it: less error than the scale of the largest number gives."""
    matrix = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    found = encoding_of("int4").values(encoding_of("int4").pack(matrix))
    scale = np.repeat(np.abs(matrix).reshape(64, -1, 32).max(-1), 32, axis=1) / 7
    simple = np.rint(matrix / scale) * scale
    assert np.square(found - matrix).sum() < 0.85 * np.square(simple - matrix).sum()


@given(name=st.sampled_from(NAMES), start=st.integers(0, 5), count=st.integers(1, 5), step=st.integers(1, 2))
@settings(deadline=None)
def test_rows_of_a_packed_matrix_are_those_of_its_numbers(name, start, count, step):
    stored = encoding_of(name)
    packed = stored.pack(np.random.default_rng(0).standard_normal((48, 64)).astype(np.float32))
    rows = slice(8 * start, 8 * (start + count), step)
    if name == "fp8-8x32" and step > 1:
        with pytest.raises(ValueError, match="share blocks of 8 rows with others"):
            stored.take(packed, rows)
    else:
        np.testing.assert_array_equal(stored.values(stored.take(packed, rows)), stored.values(packed)[rows])


@pytest.mark.parametrize("name", ["int4", "int4-g32-float16-zeros", "mxfp4", "nvfp4"])
def test_several_threads_pack_what_one_does(name, monkeypatch):
    matrix = np.random.default_rng(0).standard_normal((70, 4096)).astype(np.float32)
    alone = encoding_of(name).pack(matrix)
    monkeypatch.setattr(encoding, "THREADS_FROM", 1)
    monkeypatch.setattr(encoding, "cores", lambda: 3)
    for array, other in zip(alone, encoding_of(name).pack(matrix), strict=True):
        np.testing.assert_array_equal(array, other)


@given(st.lists(st.floats(-500, 500, width=32), min_size=1, max_size=50))
def test_codes_of_small_floats_are_the_nearest(values):
    values = np.array(values, np.float32)
    for known, codes in ((E2M1_VALUES, e2m1_codes(values)), (E4M3_VALUES, e4m3_codes(values))):
        finite = known[np.isfinite(known)]
        nearest = np.abs(values[:, None] - finite).min(1)
        np.testing.assert_array_equal(np.abs(known[codes] - values), nearest)


def test_every_code_stands_for_its_number_in_jax_too():
    codes = np.arange(256, dtype=np.uint8)
    for decode, some in ((e2m1, codes[:16]), (e4m3, codes), (e8m0, codes[1:])):
        np.testing.assert_array_equal(bits(decode(some)), bits(decode(jnp.asarray(some))))
    np.testing.assert_array_equal(e8m0(codes[:-1]), np.ldexp(np.float32(1), np.arange(-127, 128)))
    assert (e4m3(codes) == codes.view("u1").view(jnp.float8_e4m3fn).astype(np.float32))[:127].all()
    for name in NAMES:
        packed = encoding_of(name).pack(matrices(SWIGLU, 64, 96)[0])
        of_jax = jax.jit(encoding_of(name).values)(jax.device_put(list(packed)))
        np.testing.assert_array_equal(bits(of_jax), bits(encoding_of(name).values(packed)))
    packed = np.arange(48, dtype=np.uint8).reshape(3, 16)
    np.testing.assert_array_equal(joined(nibbles(packed)), packed)


def test_names_say_what_a_format_is():
    for name in NAMES:
        assert format_named(name).name == name
        assert format_named(name) is format_named(name)
    assert format_named("int4-g32-float16") is format_named("int4")
    assert format_named("fp8-128x128") is format_named("fp8")
    for name in ("int4-g32", "int4-g128-float32", "fp8-0x8", "mxfp4-g32"):
        with pytest.raises(ValueError, match=r"expected one of the formats float32, .*nvfp4, got"):
            format_named(name)
    with pytest.raises(ValueError, match="a multiple of 32 numbers, got 48"):
        format_named("int4-g48-float16")


def test_rows_that_do_not_divide_are_refused_with_a_way_out():
    for name in ("int4", "mxfp4", "nvfp4"):
        with pytest.raises(ValueError, match=rf"'{name}' stores groups of .* rows of 20 .*choose"):
            format_named(name).buffers(32, 20)
