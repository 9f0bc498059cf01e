"""Experts in encoded formats: the bits of plain experts with the weights that they stand for."""

import functools

import jax
import ml_dtypes
import numpy as np
import pytest
from helpers import bits
from hypothesis import given, settings
from hypothesis import strategies as st

from layerscope_jax.formats import format_named
from layerscope_jax.kernels import amx, vectors
from layerscope_jax.kernels.cpu import CpuExperts, InMemory, WorkStats
from layerscope_jax.kernels.grouping import Assignments
from layerscope_jax.kernels.host_kernels import ENCODED, KERNELS, kernel_of
from layerscope_jax.models.experts import ExpertBody

FORMATS = ["int8", "int4", "int4-g128-bfloat16", "int4-g64-float16-zeros", "mxfp4", "nvfp4"]
FORMATS += ["fp8", "fp8-channel", "fp8-tensor", "fp8-64x32"]
SHAPES = [(128, 384), (1280, 256), (256, 640)]
BODIES = [ExpertBody(), ExpertBody("clamped", bias=True)]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
WAYS = [("float32", 0), ("bfloat16", 0)]
WAYS += [("bfloat16", 1)] if vectors.suit(BFLOAT16, 32) else []
WAYS += [("bfloat16", 2)] if amx.available() else []


@functools.cache
def computer(kernel):
    return CpuExperts(2, kernel)


@functools.cache
def expert(name, shape, body):
    """Packed matrices, and a plain expert of what they stand for."""
    (width, hidden), rng = shape, np.random.default_rng(3)
    matrices = [
        rng.standard_normal(size) / 16 for size in ((hidden, width), (hidden, width), (width, hidden))
    ]
    bias = [rng.standard_normal(2 * hidden + width)] if body.bias else []
    format = format_named(name).for_body(body)
    packed = format.pack(*(array.astype(np.float32) for array in (*matrices, *bias)))
    return format, packed, format.unpack(packed)


def rows_of(kernel, inputs, tokens, weights, format):
    held = InMemory.of(type(weights)(*map(jax.device_put, weights)), format)
    chosen = Assignments(np.zeros((len(inputs), 1), np.int32), np.isin(np.arange(len(inputs)), tokens))
    outputs = np.zeros((len(inputs) + 1, inputs.shape[1]), inputs.dtype)
    computer(kernel).compute(outputs, inputs, chosen, [0], lambda _: [held], WorkStats())
    assert not np.delete(outputs[:-1], tokens, 0).any()
    return outputs[tokens]


@pytest.mark.parametrize("name", FORMATS)
@given(data=st.data(), count=st.integers(1, 80), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=8)
def test_they_are_plain_experts_bit_for_bit(name, data, count, seed):
    shape, body = data.draw(st.sampled_from(SHAPES)), data.draw(st.sampled_from(BODIES))
    dtype, way = data.draw(st.sampled_from(WAYS))
    format, packed, plain = expert(name, shape, body)
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((80, shape[0])).astype(dtype)
    tokens = np.sort(rng.permutation(80)[:count])
    rounded = type(plain)(*(np.asarray(array).astype(dtype) for array in plain[:3]), *plain[3:])
    if body.bias:  # plain experts have biases of the weights' dtype: those that both can hold
        coarse = np.asarray(plain.bias).astype(BFLOAT16).astype(np.float32)
        packed, rounded = packed._replace(bias=coarse), rounded._replace(bias=coarse.astype(dtype))
    found = rows_of(ENCODED[way], inputs, tokens, packed, format)
    expected = rows_of(KERNELS[way], inputs, tokens, rounded, format_named(dtype).for_body(body))
    assert np.isfinite(found.astype(np.float32)).all()
    np.testing.assert_array_equal(bits(found), bits(expected))


def test_every_format_has_a_kernel_but_rows_that_are_no_chunks():
    for name in FORMATS:
        for dtype in ("float32", "bfloat16"):
            assert kernel_of(format_named(name), np.dtype(dtype), 256, 640) in ENCODED
    assert kernel_of(format_named("int8"), np.dtype("float32"), 44, 36) is None
    assert kernel_of(format_named("int4"), np.dtype("float16"), 256, 640) is None
