"""Gated DeltaNet: whole chunks, single tokens and what lies between padding give one and the same state."""

from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from layerscope_jax.models import delta_net
from layerscope_jax.models.config import DeltaSizes
from layerscope_jax.models.delta_net import DeltaCache, DeltaNet
from layerscope_jax.models.layers import abstract
from layerscope_jax.models.rotary import PAD_POSITION

pytestmark = pytest.mark.usefixtures("quick_compiles")

SIZES = DeltaSizes(key_heads=2, value_heads=4, key=8, value=6, taps=4)
CONFIG = replace(TINY, attention="delta", delta=SIZES)
LENGTH, CHUNK = 11, 4  # two whole chunks and a part of one


@cache
def layer():
    """A layer, and its jitted call, which gives arrays of NumPy."""
    rng = np.random.default_rng(3)
    graphdef, state = nnx.split(abstract(lambda rngs: DeltaNet(CONFIG, rngs=rngs, dtype=np.float32)))
    params = jax.tree.map(
        lambda array: rng.standard_normal(array.shape).astype(np.float32) / 2, nnx.to_pure_dict(state)
    )
    call = jax.jit(lambda *inputs: nnx.merge(graphdef, params)(*inputs))
    return params, lambda *inputs: jax.tree.map(np.asarray, call(*inputs))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(delta_net, "CHUNK", CHUNK)


@cache
def hidden():
    return np.random.default_rng(5).standard_normal((2, LENGTH, TINY.hidden_size)).astype(np.float32)


def empty(rows):
    shapes = DeltaNet.cache_shapes(CONFIG, rows, 0)
    return DeltaCache(*(np.zeros(array.shape, np.float32) for array in shapes))


@cache
def expected():
    """By the definition, token by token in float64: outputs [B, S, D], and the cache after each token."""
    p = jax.tree.map(np.float64, layer()[0])
    x = np.float64(hidden())
    keys, values = SIZES.key_heads, SIZES.value_heads
    flat = {name: p[name].reshape(-1, x.shape[-1]) for name in ("z", "b", "a")}
    every = np.pad(x @ p["qkv"]["weight"].T, ((0, 0), (SIZES.taps - 1, 0), (0, 0)))
    state = np.zeros((len(x), values, SIZES.key, SIZES.value))
    outputs, caches = [], []
    for token in range(LENGTH):
        mixed = silu((every[:, token : token + SIZES.taps] * p["taps"].T).sum(1))
        query, key, value = np.split(mixed, [keys * SIZES.key, 2 * keys * SIZES.key], axis=-1)
        query, key = (part.reshape(len(x), keys, -1).repeat(values // keys, 1) for part in (query, key))
        query, key = (part / np.sqrt((part**2).sum(-1, keepdims=True) + 1e-6) for part in (query, key))
        rate = 1 / (1 + np.exp(-x[:, token] @ flat["b"].T))
        fade = np.log1p(np.exp(x[:, token] @ flat["a"].T + p["fading_bias"])) * np.exp(p["fading"])
        state = state * np.exp(-fade)[..., None, None]
        missing = value.reshape(len(x), values, -1) - np.einsum("bhk,bhkv->bhv", key, state)
        state = state + np.einsum("bhk,bhv->bhkv", key, missing * rate[..., None])
        read = np.einsum("bhk,bhkv->bhv", query, state) / np.sqrt(SIZES.key)
        read /= np.sqrt((read**2).mean(-1, keepdims=True) + CONFIG.norm_eps)
        gated = read * p["norm"]["scale"] * silu(x[:, token] @ flat["z"].T).reshape(read.shape)
        outputs.append(gated.reshape(len(x), -1) @ p["out"]["weight"].T)
        caches.append(DeltaCache(every[:, token + 1 : token + SIZES.taps], state))
    return np.stack(outputs, axis=1), caches


def silu(x):
    return x / (1 + np.exp(-x))


def near(actual, known):
    np.testing.assert_allclose(actual, known, rtol=0, atol=2e-5)


def test_a_prefill_and_single_tokens_are_what_the_definition_says():
    known, caches = expected()
    _, call = layer()
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (2, LENGTH))
    output, none = call(hidden(), positions, None)
    near(output, known)
    assert none is None
    cache = empty(2)
    for token in range(LENGTH):
        output, cache = call(hidden()[:, token : token + 1], positions[:, token : token + 1], cache)
        near(output[:, 0], known[:, token])
        jax.tree.map(near, cache, caches[token])


@settings(max_examples=30, deadline=None)
@given(
    ends=st.tuples(*[st.tuples(st.integers(0, LENGTH), st.integers(0, LENGTH))] * 2),
    left=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_wherever_a_prompt_is_cut_and_padded_the_state_is_the_same(ends, left):
    """In three steps of one width: of each row some tokens, or none, with padding on either side."""
    known, caches = expected()
    _, call = layer()
    cache, begins = empty(2), (0, 0)
    for side, stops in zip(left, (*zip(*map(sorted, ends), strict=True), (LENGTH, LENGTH)), strict=True):
        inputs = np.full_like(hidden(), 7.0)  # what padding reads changes nothing
        positions = np.full((2, LENGTH), PAD_POSITION, np.int32)
        places = []
        for row, (begin, stop) in enumerate(zip(begins, stops, strict=True)):
            first = LENGTH - (stop - begin) if side else 0
            places.append(slice(first, first + stop - begin))
            inputs[row, places[row]] = hidden()[row, begin:stop]
            positions[row, places[row]] = np.arange(begin, stop)
        output, after = call(inputs, positions, cache)
        for row, (begin, stop) in enumerate(zip(begins, stops, strict=True)):
            near(output[row, places[row]], known[row, begin:stop])
            for now, before, array in zip(after, cache, range(2), strict=True):
                near(now[row], caches[stop - 1][array][row] if stop else before[row])
        cache, begins = after, stops


def test_a_finished_row_of_a_decode_step_keeps_its_state_bit_for_bit():
    _, call = layer()
    full = DeltaCache(*(np.float32(array) for array in expected()[1][4]))
    positions = np.array([[5], [PAD_POSITION]], np.int32)
    _, after = call(hidden()[:, 5:6], positions, full)
    for now, before, later in zip(after, full, expected()[1][5], strict=True):
        np.testing.assert_array_equal(now[1], before[1])
        near(now[0], later[0])
