"""Rotary position embeddings (arXiv 2104.09864), and the ways in which contexts were lengthened."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

PAD_POSITION = 2**30
"""Position of a padding token: no query reaches it as a key, and no cache has a row for it."""

ScalingKind = Literal["linear", "dynamic", "yarn", "llama3", "longrope", "proportional"]


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How the frequencies of a rotary embedding are changed for contexts longer than those first trained on.

    Attributes:
        kind: "linear" divides all frequencies by `factor`; "dynamic" raises the base as a sequence grows past
            the original length; "yarn" (arXiv 2309.00071) divides the low ones and keeps the high ones;
            "llama3" does so by wavelength; "longrope" (arXiv 2402.13753) divides each by a number of its own,
            of one list for sequences up to the original length and of another for longer ones; "proportional"
            keeps the high ones, and does not turn the other numbers at all.
        factor: by which the context grew.
        original_max_position_embeddings: length of the context before.
        attention_factor: what cosines and sines are multiplied with; None for the kind's own rule.
        beta_fast, beta_slow, truncate: of "yarn": turns within the original context between which it blends,
            and whether these limits are rounded to whole frequencies.
        mscale, mscale_all_dim: of "yarn", in DeepSeek's models.
        low_freq_factor, high_freq_factor: of "llama3".
        short_factor, long_factor: of "longrope": a number for each frequency.
        part: of "proportional": how many of the frequencies are kept, as a part of all.
        short_mscale, long_mscale: of "longrope", in Phi-MoE: in the place of `attention_factor`.
    """

    kind: ScalingKind
    factor: float = 1.0
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    mscale: float | None = None
    mscale_all_dim: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    part: float = 1.0
    short_mscale: float | None = None
    long_mscale: float | None = None


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """Returns YaRN's growth of the logits of attention with the length of the context."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def magnitude(scaling: RopeScaling | None) -> float:
    """Returns what cosines and sines are multiplied with (but for Phi-MoE's `short_mscale`).

    >>> round(magnitude(RopeScaling(kind="yarn", factor=32.0, original_max_position_embeddings=4096)), 4)
    1.3466
    """
    if scaling is None:
        return 1.0
    if scaling.kind == "yarn" and scaling.attention_factor is None:
        if scaling.mscale and scaling.mscale_all_dim:
            both = yarn_mscale(scaling.factor, scaling.mscale)
            return both / yarn_mscale(scaling.factor, scaling.mscale_all_dim)
        return yarn_mscale(scaling.factor)
    if scaling.kind == "longrope" and scaling.attention_factor is None and scaling.factor > 1:
        return math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original_max_position_embeddings))
    return 1.0 if scaling.attention_factor is None else scaling.attention_factor


@functools.lru_cache(maxsize=64)
def frequencies(size: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Returns the angle that each pair of numbers turns by from a position to the next one.

    Args:
        size: numbers of a head that are rotated.
        theta: base.
        scaling: how they are changed; "dynamic" ones as within the original context.

    Returns:
        [N, size / 2] float32: N is 2 for "longrope", its short and its long ones, and 1 for all others.
    """
    powers = np.float32(theta) ** (np.arange(0, size, 2, dtype=np.float32) / np.float32(size))
    plain = (1.0 / powers).astype(np.float32)
    if scaling is None or scaling.kind == "dynamic":
        return plain[None]
    factor, original = scaling.factor, scaling.original_max_position_embeddings
    if scaling.kind == "proportional":
        turned = np.arange(size // 2) < int(scaling.part * size // 2)
        return (np.where(turned, plain, 0) / np.float32(factor)).astype(np.float32)[None]
    if scaling.kind == "linear":
        return plain[None] / np.float32(factor)
    if scaling.kind == "longrope":
        lists = np.array([scaling.short_factor, scaling.long_factor], np.float32)
        return (1.0 / (lists * powers)).astype(np.float32)
    if scaling.kind == "yarn":

        def pair(turns: float) -> float:
            return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
        if scaling.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, size - 1)
        high += 0.001 if low == high else 0
        ramp = np.clip((np.arange(size // 2, dtype=np.float32) - low) / (high - low), 0, 1)
        return (plain / np.float32(factor) * ramp + plain * (1 - ramp)).astype(np.float32)[None]
    wavelengths = 2 * math.pi / plain
    smooth = (original / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - smooth) * plain / factor + smooth * plain
    slow, fast = original / scaling.low_freq_factor, original / scaling.high_freq_factor
    chosen = np.where(wavelengths > slow, plain / factor, np.where(wavelengths < fast, plain, blended))
    return chosen.astype(np.float32)[None]


def rotate(x: jax.Array, positions: jax.Array, config: Any, size: int | None = None) -> jax.Array:
    """Turns pairs of numbers of each head by angles that grow with the position.

    A pair is a number of the first half and the same one of the second; with `config.rope_interleaved` two
    neighbours, whose turned numbers then lie in halves too: as queries and keys do alike, no product changes.

    Args:
        x: [B, S, H, D_head].
        positions: [B, S] int32.
        config: gives `rope_theta`, `rope_scaling` and `rope_interleaved` (`ModelConfig`).
        size: the first so many numbers of a head are rotated, the others stay; None for all.
    """
    size = x.shape[-1] if size is None else size
    scaling = config.rope_scaling
    table = frequencies(size, config.rope_theta, scaling)
    scale: Any = magnitude(scaling)
    if scaling is None or scaling.kind not in ("dynamic", "longrope"):
        angles = positions.astype(jnp.float32)[:, :, None, None] * table[0][None, None, None, :]
    else:
        turns, scale = _by_length(table, scale, positions, config.rope_theta, scaling)
        angles = positions.astype(jnp.float32)[:, :, None, None] * turns[:, None, None, :]
    cos, sin = _cosines(angles, positions)  # [B, S, 1, size / 2]
    if not isinstance(scale, float) or scale != 1.0:
        cos, sin = cos * scale, sin * scale
    wide, kept = x[..., :size].astype(jnp.float32), x[..., size:]
    if config.rope_interleaved:
        first, second = wide[..., ::2], wide[..., 1::2]
    else:
        first, second = jnp.split(wide, 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    turned = turned.astype(x.dtype)
    return turned if size == x.shape[-1] else jnp.concatenate([turned, kept], axis=-1)


_apart: ContextVar[bool] = ContextVar("apart", default=False)


@contextlib.contextmanager
def cosines_apart() -> Iterator[None]:
    """While a program for a CPU is traced within, cosines and sines are computed once for all heads.

    XLA would compute them anew with each number that is turned, which took a fifth of a
    prefill's attention for a Mixtral-shaped model on a Xeon.
    """
    before = _apart.set(True)
    try:
        yield
    finally:
        _apart.reset(before)


def _cosines(angles: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of angles."""

    def both(angles: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.cos(angles), jnp.sin(angles)

    if not _apart.get():
        return both(angles)
    # Nothing is computed together with what is in a branch, and XLA does not know that it is always this one.
    return jax.lax.cond(positions.reshape(-1)[0] >= 0, both, lambda angles: (angles, angles), angles)


def _by_length(
    table: np.ndarray, scale: float, positions: jax.Array, theta: float, scaling: RopeScaling
) -> tuple[jax.Array, Any]:
    """Frequencies [B, size / 2] of rows by their length so far, and what multiplies cosines and sines."""
    real = jnp.where(positions < PAD_POSITION, positions, 0)
    length = real.max(axis=1) + 1  # [B]
    original = scaling.original_max_position_embeddings
    if scaling.kind == "dynamic":
        size = 2 * table.shape[1]
        longest = jnp.maximum(length, original).astype(jnp.float32)
        growth = scaling.factor * longest / original - (scaling.factor - 1)
        base = theta * growth ** (size / (size - 2))
        powers = jnp.arange(0, size, 2, dtype=jnp.float32) / size
        return 1.0 / base[:, None] ** powers[None], scale
    longer = length > original
    turns = jnp.where(longer[:, None], table[1][None], table[0][None])
    if scaling.short_mscale is None or scaling.long_mscale is None:
        return turns, scale
    magnitudes = jnp.where(longer, scaling.long_mscale, scaling.short_mscale)
    return turns, magnitudes.astype(jnp.float32)[:, None, None, None]
