"""Loops of attention write what they are to write, and not one byte beside it."""

import ml_dtypes
import numpy as np
from guarded import WORDS, Guarded, job, numbers
from hypothesis import given, settings
from hypothesis import strategies as st

from layerscope_jax.kernels import (
    amx,
    attention,
    crew,
    delta_memory,
    head_products,
    latent_attention,
    loops,
    prefill_attention,
    vectors,
)

pairs = vectors.suit(np.dtype(ml_dtypes.bfloat16), 32, 32)


def cache(rng, rows, heads, size, length, stored):
    """Keys, values of which `stored` numbers lie in a row, and scales and sinks of five query heads each."""
    keys, values = (rows, heads, size, length), (rows, heads, length, stored)
    return [numbers(rng, shape, np.float32) for shape in (keys, values, (heads * 5, 2))]


@given(
    words=st.sampled_from(["float32", "uint16"]),
    rows=st.integers(1, 3),
    heads=st.integers(1, 3),
    groups=st.integers(1, 5),
    size=st.integers(1, 70),
    value_size=st.integers(1, 70),
    length=st.integers(1, 200),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60)
def test_attention_of_one_token_a_row(words, rows, heads, groups, size, value_size, length, seed):
    rng, guarded = np.random.default_rng(seed), Guarded()
    dtype = np.float32 if words == "float32" else ml_dtypes.bfloat16
    keys, values, weighing = cache(rng, rows, heads, size, length, value_size + seed % 3)
    queries = numbers(rng, (rows, heads * groups, size), dtype)
    outputs = guarded.array((rows, heads * groups, value_size), dtype)
    bounds = np.sort(rng.integers(0, length + 1, (rows, 2)).astype(np.int32), 1)
    work = job(
        PARTS=rows * heads,
        INPUTS=queries,
        WEIGHTS=keys,
        OUTPUTS=outputs,
        ROWS=rows,
        DEPTH=size,
        WIDTH=length,
        VALUES=values,
        BOUNDS=bounds,
        HEADS=heads,
        GROUPS=groups,
        STORED=values.shape[3],
        VALUE_SIZE=value_size,
        WEIGHING=weighing,
    )
    attention.rows(WORDS[words]).ctypes(work.ctypes.data)
    guarded.check()
    assert np.isfinite(outputs.astype(np.float32)).all()


@given(
    words=st.sampled_from(["float32", "uint16"]),
    rows=st.integers(1, 3),
    heads=st.integers(1, 40),
    width=st.integers(1, 70),
    length=st.integers(1, 300),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60)
def test_latent_attention_of_one_token_a_row(words, rows, heads, width, length, seed):
    rng, guarded = np.random.default_rng(seed), Guarded()
    dtype = np.float32 if words == "float32" else ml_dtypes.bfloat16
    rank = int(rng.integers(1, width + 1))
    lasts = rng.integers(0, length + 1, rows).astype(np.int32)
    starts = np.concatenate([[0], np.cumsum(-(-lasts.astype(np.int64) // latent_attention.PIECE))])
    queries, scale = numbers(rng, (rows, heads, width), dtype), np.ones(1, np.float32)
    latents = numbers(rng, (rows, length, width), np.float32)
    outputs = guarded.array((rows, heads, rank), dtype)
    sums = guarded.array((starts[-1], heads, rank + latent_attention.SPARE), np.float32)
    work = job(
        latent_attention,
        PARTS=starts[-1] * -(-heads // latent_attention.GROUP),
        INPUTS=queries,
        WEIGHTS=latents,
        OUTPUTS=outputs,
        ROWS=rows,
        DEPTH=width,
        WIDTH=length,
        LASTS=lasts,
        STARTS=starts,
        SCALE=scale,
        SUMS=sums,
        HEADS=heads,
        RANK=rank,
    )
    latent_attention.pieces(WORDS[words]).ctypes(work.ctypes.data)
    work[[crew.TAKEN, latent_attention.GATHERS, crew.PARTS]] = 0, 1, rows * heads
    latent_attention.pieces(WORDS[words]).ctypes(work.ctypes.data)
    guarded.check()
    assert np.isfinite(outputs.astype(np.float32)).all()


@given(
    words=st.sampled_from(["float32", "uint16", *(["int16"] if pairs else [])]),
    rows=st.integers(1, 140),
    number=st.integers(1, 3),
    steps=st.integers(1, 9),
    columns=st.integers(1, 4),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=30)
def test_products_of_heads(words, rows, number, steps, columns, seed):
    rng, guarded = np.random.default_rng(seed), Guarded()
    dtype = np.float32 if words == "float32" else ml_dtypes.bfloat16
    depth = (vectors.COLUMNS if words == "int16" else vectors.ROWS) * steps
    x = numbers(rng, (rows, number, depth), dtype)
    weights = numbers(rng, (number, columns * vectors.COLUMNS, depth), dtype)
    outputs = guarded.array((rows, number, weights.shape[1]), dtype)
    work = job(
        head_products,
        PARTS=number * -(-rows // amx.PIECE),
        INPUTS=x,
        WEIGHTS=weights,
        OUTPUTS=outputs,
        ROWS=rows,
        DEPTH=depth,
        WIDTH=weights.shape[1],
        HEADS=number,
    )
    head_products.heads(loops.multiply, np.float32 if words == "float32" else np.uint16, WORDS[words]).ctypes(
        work.ctypes.data
    )
    guarded.check()
    exact = np.einsum("thk,hnk->thn", x.astype(np.float64), weights.astype(np.float64))
    np.testing.assert_allclose(outputs.astype(np.float64), exact, rtol=2e-2, atol=2e-2)


@given(
    words=st.sampled_from(["float32", "uint16"]),
    rows=st.integers(1, 2),
    tokens=st.integers(1, 60),
    heads=st.integers(1, 2),
    groups=st.integers(1, 5),
    size=st.integers(1, 3),
    value_size=st.integers(1, 9),
    length=st.integers(1, 8),
    window=st.integers(1, 300),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60)
def test_attention_of_many_tokens_a_row(
    words, rows, tokens, heads, groups, size, value_size, length, window, seed
):
    rng, guarded = np.random.default_rng(seed), Guarded()
    dtype = np.float32 if words == "float32" else ml_dtypes.bfloat16
    size, value_size, length = (number * vectors.COLUMNS for number in (size, value_size, length))
    keys, values, weighing = cache(rng, rows, heads, size, length, value_size + seed % 3)
    queries = numbers(rng, (rows, tokens, heads * groups, size), dtype)
    outputs = guarded.array((rows, tokens, heads * groups, value_size), dtype)
    last = np.minimum(np.arange(tokens) + 1 + rng.integers(0, length, (rows, 1)), length)
    last = np.where(rng.random(last.shape) < 0.2, 0, last)  # some are none
    bounds = np.stack([np.maximum(last - window, 0), last], -1).astype(np.int32)
    blocks = -(-tokens // max(1, prefill_attention.BLOCK // groups))
    work = job(
        PARTS=rows * heads * blocks,
        INPUTS=queries,
        WEIGHTS=keys,
        OUTPUTS=outputs,
        ROWS=rows,
        DEPTH=size,
        WIDTH=length,
        VALUES=values,
        BOUNDS=bounds,
        HEADS=heads,
        GROUPS=groups,
        TOKENS=tokens,
        STORED=values.shape[3],
        VALUE_SIZE=value_size,
        WEIGHING=weighing,
    )
    prefill_attention.blocks(WORDS[words]).ctypes(work.ctypes.data)
    guarded.check()
    assert np.isfinite(outputs.astype(np.float32)).all()


@given(
    rows=st.integers(1, 2),
    keys=st.integers(1, 2),
    shared=st.integers(1, 2),
    size=st.integers(1, 20),
    registers=st.integers(1, 6),
    tokens=st.integers(1, 5),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60)
def test_memory_of_delta_net(rows, keys, shared, size, registers, tokens, seed):
    rng, guarded, width = np.random.default_rng(seed), Guarded(), registers * vectors.LANES
    values, apart = (rows, tokens, keys * shared, width), (rows, tokens, keys * shared)
    query, key = (numbers(rng, (rows, tokens, keys, size), np.float32) for _ in range(2))
    value, left, rate = (numbers(rng, shape, np.float32) for shape in (values, apart, apart))
    before = numbers(rng, (rows, keys * shared, size, width), np.float32)
    outputs, after = guarded.array(values, np.float32), guarded.array(before.shape, np.float32)
    work = job(
        delta_memory,
        PARTS=rows * keys * shared,
        INPUTS=query,
        WEIGHTS=key,
        OUTPUTS=outputs,
        ROWS=rows,
        DEPTH=size,
        WIDTH=width,
        KEY_HEADS=keys,
        HEADS=keys * shared,
        TOKENS=tokens,
        VALUES=value,
        LEFT=left,
        RATES=rate,
        BEFORE=before,
        AFTER=after,
    )
    delta_memory.heads().ctypes(work.ctypes.data)
    guarded.check()
    assert np.isfinite(outputs).all()
    assert np.isfinite(after).all()
