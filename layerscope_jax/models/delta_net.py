"""Gated DeltaNet (arXiv 2412.06464): attention whose memory of all earlier positions is one matrix a head.

A token's key says where in the matrix its value is written: what lies there is read first, and only the
difference is added, as far as the token's rate says; before, everything fades. Queries and keys first go
through a short causal convolution with their neighbours, as do the values.

Padding changes nothing: it neither enters the convolution of later tokens nor writes or fades the matrix. So
rows of a batch that are finished, or shorter than others, keep their state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from layerscope_jax.models.cache import CacheArray
from layerscope_jax.models.config import DeltaSizes, ModelConfig
from layerscope_jax.models.experts import dense
from layerscope_jax.models.invariance import is_invariant
from layerscope_jax.models.layers import Linear, RMSNorm, normal
from layerscope_jax.models.rotary import PAD_POSITION

CHUNK = 32
"""Tokens that are taken at once in a prefill: within them all pairs are multiplied, from chunk to chunk the
state is. Twice as many took a Qwen3-Next-shaped model 1.1 to 1.2 times as long on a Xeon, as a system of
equations grows with their square."""

SMALLEST_SQUARE = 1e-6
"""Added to the squared length of queries and keys, which are divided by their length."""


class DeltaCache(NamedTuple):
    """What one layer keeps of all earlier positions together; it has no axis of positions."""

    latest: jax.Array  # [B, W - 1, C] the latest inputs of the convolution
    state: jax.Array  # [B, H_v, D_k, D_v] float32

    @staticmethod
    def position_axes() -> tuple[int | None, ...]:
        return None, None


Remembering = Callable[..., "tuple[jax.Array, jax.Array] | None"]
"""`layerscope_jax.kernels.delta_memory.delta_memory`, its table given."""

_remembering: ContextVar[Remembering | None] = ContextVar("remembering", default=None)


@contextlib.contextmanager
def remembering_by(memory: Remembering) -> Iterator[None]:
    """While a program is traced within, states go through tokens by this, where this gives any."""
    before = _remembering.set(memory)
    try:
        yield
    finally:
        _remembering.reset(before)


class DeltaNet(nnx.Module):
    """Gated DeltaNet as in Qwen3-Next, with a convolution of W taps over C = 2 H_k D_k + H_v D_v channels.

    Several heads of values share a head of queries and keys: G = H_v / H_k.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.config = config
        sizes, width = delta_sizes(config), config.hidden_size
        keys, values = sizes.key_heads, sizes.value_heads
        shared = values // keys
        self.qkv = Linear(width, sizes.channels, bias=False, rngs=rngs, dtype=dtype)
        # By heads of keys, whose number the tables of weights read off the shapes.
        self.z = nnx.Param(normal(rngs, (keys, shared * sizes.value, width), dtype))
        self.b = nnx.Param(normal(rngs, (keys, shared, width), dtype))
        self.a = nnx.Param(normal(rngs, (keys, shared, width), dtype))
        self.taps = nnx.Param(normal(rngs, (sizes.channels, sizes.taps), dtype))
        # Exponents of how fast states fade: float32 in any model.
        self.fading = nnx.Param(jnp.zeros(values, jnp.float32))
        self.fading_bias = nnx.Param(jnp.ones(values, jnp.float32))
        self.norm = RMSNorm(sizes.value, config.norm_eps, dtype)
        self.out = Linear(values * sizes.value, width, bias=False, rngs=rngs, dtype=dtype)

    @staticmethod
    def cache_shapes(config: ModelConfig, rows: int, length: int) -> Any:
        """Its cache (`ModelConfig.cache_shapes`), of the same size for any length."""
        sizes = delta_sizes(config)
        latest: Any = CacheArray((rows, sizes.taps - 1, sizes.channels))
        state: Any = CacheArray((rows, sizes.value_heads, sizes.key, sizes.value), jnp.float32)
        return DeltaCache(latest, state)

    def __call__(
        self, hidden: jax.Array, positions: jax.Array, cache: DeltaCache | None
    ) -> tuple[jax.Array, DeltaCache | None]:
        """Goes on from the cache's state through `hidden` [B, S, D], whose tokens follow each other.

        Args:
            hidden: [B, S, D].
            positions: [B, S]; `PAD_POSITION` marks padding, which may lie on either side of a row's tokens.
            cache: as left by the tokens before; None where there are none.

        Returns:
            [B, S, D], meaningless at padding, and the cache after these tokens.
        """
        sizes, (rows, length, width) = delta_sizes(self.config), hidden.shape
        real = positions < PAD_POSITION
        mixed, gate, rate, fade = dense(
            hidden, self.qkv.weight[...], *(part[...].reshape(-1, width) for part in (self.z, self.b, self.a))
        )
        latest = None if cache is None else cache.latest
        mixed, latest = convolve(mixed, real, self.taps[...], latest)
        keys = sizes.key_heads * sizes.key
        query, key, value = jnp.split(mixed, [keys, 2 * keys], axis=-1)
        query, key = (unit(x.reshape(rows, length, sizes.key_heads, -1)) for x in (query, key))
        value = value.reshape(rows, length, sizes.value_heads, -1).astype(jnp.float32)
        rate, fade = (jnp.where(real[..., None], x, 0.0) for x in (jax.nn.sigmoid(rate), self.faded(fade)))
        if cache is None:
            state = jnp.zeros((rows, sizes.value_heads, sizes.key, sizes.value), jnp.float32)
        else:
            state = cache.state
        parts = query * sizes.key**-0.5, key, value, fade, rate.astype(jnp.float32), state
        by_loops, go = _remembering.get(), step if length == 1 else scan
        read, state = (by_loops and by_loops(*parts)) or go(*parts)
        gate = jax.nn.silu(gate.reshape(read.shape).astype(jnp.float32))
        output = (self.norm(read.astype(hidden.dtype)).astype(jnp.float32) * gate).astype(hidden.dtype)
        output = self.out(output.reshape(rows, length, -1))
        return output, None if cache is None or latest is None else DeltaCache(latest, state)

    def faded(self, fade: jax.Array) -> jax.Array:
        """Logarithms of what is left of a state after each token, from projections [B, S, H_v]."""
        rate, bias = (part[...].astype(jnp.float32)[None, None] for part in (self.fading, self.fading_bias))
        return -jnp.exp(rate) * jax.nn.softplus(fade.astype(jnp.float32) + bias)


def convolve(
    inputs: jax.Array, real: jax.Array, taps: jax.Array, latest: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """Sums of each channel's latest inputs, weighted, through SiLU; sums in float32.

    Args:
        inputs: [B, S, C].
        real: [B, S] False at padding, on either side of a row's tokens.
        taps: [C, W] weights, of the token itself the last.
        latest: [B, W - 1, C] the inputs before; None for zeros.

    Returns:
        [B, S, C], and the latest inputs after these (None if `latest` is).
    """
    (rows, length, channels), count = inputs.shape, taps.shape[1]
    inputs = jnp.where(real[..., None], inputs, jnp.zeros((), inputs.dtype))
    kept = None
    if latest is None:
        latest = jnp.zeros((rows, count - 1, channels), inputs.dtype)
        every = jnp.concatenate([latest, inputs], axis=1)  # [B, W - 1 + S, C]
    elif length == 1:
        every = jnp.concatenate([latest.astype(inputs.dtype), inputs], axis=1)
        kept = jnp.where(real[..., None], every[:, 1:].astype(latest.dtype), latest)
    else:  # those before come right before a row's first token
        row, ago = jnp.arange(rows)[:, None], jnp.arange(count - 1)[None]
        first = jnp.argmax(real, axis=1)[:, None]
        every = jnp.pad(inputs, ((0, 0), (count - 1, 0), (0, 0)))
        every = every.at[row, first + ago].set(latest.astype(inputs.dtype))
        kept = every[row, first + real.sum(axis=1)[:, None] + ago].astype(latest.dtype)
    wide, weights = every.astype(jnp.float32), taps.astype(jnp.float32)
    total = jnp.zeros((rows, length, channels), jnp.float32)
    for tap in range(count):
        total += wide[:, tap : tap + length] * weights[None, None, :, tap]
    return jax.nn.silu(total).astype(inputs.dtype), kept


def unit(x: jax.Array) -> jax.Array:
    """`x` over its length along the last axis, in float32."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt((wide * wide).sum(-1, keepdims=True) + SMALLEST_SQUARE)


def step(
    query: jax.Array, key: jax.Array, value: jax.Array, fade: jax.Array, rate: jax.Array, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One token a row: reads the state where its key says, corrects it there, and reads it by its query.

    Args and returns as of `scan`, with S = 1.
    """
    shared = value.shape[2] // key.shape[2]
    query, key = (jnp.repeat(x[:, 0], shared, axis=1) for x in (query, key))  # [B, H_v, D_k]
    # The state as it was is read for both at once; what the token adds to its query's answer is known.
    both = jnp.stack([key, query], axis=2)  # [B, H_v, 2, D_k]
    left = jnp.exp(fade[:, 0])[..., None]  # [B, H_v, 1]
    held = product(both, state) * left[..., None]
    added = (value[:, 0] - held[:, :, 0]) * rate[:, 0, :, None]  # [B, H_v, D_v]
    state = state * left[..., None] + key[..., None] * added[:, :, None]
    read = held[:, :, 1] + (query * key).sum(-1, keepdims=True) * added
    return read[:, None], state


def scan(
    query: jax.Array, key: jax.Array, value: jax.Array, fade: jax.Array, rate: jax.Array, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """All tokens of each row, chunk by chunk (arXiv 2406.06484, section 3): equal to `step` for each in turn.

    What the tokens of a chunk write depends on what those before them wrote: a triangular system of equations
    gives all at once, but for what the state at the chunk's beginning adds.

    Args:
        query, key: [B, S, H_k, D_k] float32, of length one but for the query's scale.
        value: [B, S, H_v, D_v] float32.
        fade: [B, S, H_v] logarithm of what is left of the state; 0 at padding.
        rate: [B, S, H_v] how much of a correction is written; 0 at padding.
        state: [B, H_v, D_k, D_v] float32, before the first token.

    Returns:
        [B, S, H_v, D_v], and the state after the last token.
    """
    (rows, length, keys, _), values = key.shape, value.shape[2]
    # Chunks of one size give the same bits however a prompt is cut, if it is cut between them.
    chunk = CHUNK if is_invariant() else min(CHUNK, length)
    count = -(-length // chunk)

    def chunks(x: jax.Array, heads: int) -> jax.Array:
        """[B, S, H, ...] -> [N, B, H_k, G, c, ...], with padding behind the last token."""
        x = jnp.pad(x, [(0, 0), (0, count * chunk - length), *[(0, 0)] * (x.ndim - 2)])
        x = x.reshape(rows, count, chunk, keys, heads // keys, *x.shape[3:])
        return jnp.moveaxis(x, (1, 2), (0, 4))

    query, key = chunks(query, keys), chunks(key, keys)  # [N, B, H_k, 1, c, D_k]
    value, fade, rate = (chunks(x, values) for x in (value, fade, rate))
    total = jnp.cumsum(fade, axis=-1)  # [N, B, H_k, G, c] since the chunk began
    # [..., c, c] from the token of a column to that of a row
    between = total[..., :, None] - total[..., None, :]
    at_or_before = jnp.tril(jnp.ones((chunk, chunk), bool))
    left = jnp.exp(jnp.where(at_or_before[(None,) * 4], between, -jnp.inf))
    transposed = key.swapaxes(-1, -2)
    system = product(key, transposed) * left * rate[..., None]
    since = jnp.exp(total)[..., None]
    known = jnp.concatenate([value, jnp.broadcast_to(key, (*value.shape[:-1], key.shape[-1])) * since], -1)
    solved = jax.lax.linalg.triangular_solve(
        system, known * rate[..., None], left_side=True, lower=True, unit_diagonal=True
    )
    written, of_state = jnp.split(solved, [value.shape[-1]], axis=-1)
    within = product(query, transposed) * left  # [..., c, c]
    until_end = key * jnp.exp(total[..., -1:] - total)[..., None]

    def through(state: jax.Array, parts: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        written, of_state, within, asked, until_end, left = parts
        written = written - product(of_state, state)
        read = product(asked, state) + product(within, written)
        return state * left + product(until_end.swapaxes(-1, -2), written), read

    state = state.reshape(rows, keys, values // keys, *state.shape[2:])
    parts = (written, of_state, within, query * since, until_end, since[..., -1:, :])
    state, read = jax.lax.scan(through, state, parts)
    read = jnp.moveaxis(read, (0, 4), (1, 2)).reshape(rows, count * chunk, values, -1)[:, :length]
    return read, state.reshape(rows, values, *state.shape[3:])


def product(x: jax.Array, y: jax.Array) -> jax.Array:
    """`x @ y` in float32 on any device: an accelerator would otherwise round numbers to fewer bits."""
    shape = jnp.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    x, y = (jnp.broadcast_to(part, (*shape, *part.shape[-2:])) for part in (x, y))
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def delta_sizes(config: ModelConfig) -> DeltaSizes:
    """The sizes of a model's gated DeltaNet layers."""
    assert config.delta is not None
    return config.delta
