"""Three matrices of one floating point type: the format that all others are packed from, and unpack to."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layerscope_jax.formats.base import Buffer, ExpertFormat
from layerscope_jax.models.experts import (
    SWIGLU,
    BiasedWeights,
    ExpertBody,
    ExpertWeights,
    ffn,
    weights_type,
)

DTYPES = {name: np.dtype(getattr(jnp, name)) for name in ("float32", "bfloat16", "float16")}


@dataclass(frozen=True)
class PlainFormat(ExpertFormat):
    """Three matrices in a floating point type.

    Attributes:
        name: of the type.

    >>> BFLOAT16.expert_bytes(2048, 1408) == 3 * 2048 * 1408 * 2
    True
    >>> BFLOAT16.buffers(4, 2)["down"]
    Buffer(shape=(4, 2), dtype=dtype(bfloat16))
    """

    name: str
    body: ExpertBody = field(default=SWIGLU, repr=False)

    @property
    def Expert(self) -> Any:
        return weights_type(self.body)

    def for_body(self, body: ExpertBody) -> PlainFormat:
        return plain(self.name, body)

    @property
    def dtype(self) -> np.dtype:
        """Of the matrices."""
        return DTYPES[self.name]

    def buffers(self, width: int, hidden: int) -> dict[str, Buffer]:
        into, out = Buffer((hidden, width), self.dtype), Buffer((width, hidden), self.dtype)
        bias = {"bias": Buffer((2 * hidden + width,), self.dtype)} if self.body.bias else {}
        return {"gate": into, "up": into, "down": out, **bias}

    def sizes(self, expert: ExpertWeights | BiasedWeights) -> tuple[int, int]:
        hidden, width = expert.gate.shape
        return width, hidden

    def pack(self, gate: np.ndarray, up: np.ndarray, down: np.ndarray, *bias: np.ndarray) -> Any:
        return self.Expert(*(np.asarray(array, self.dtype) for array in (gate, up, down, *bias)))

    def unpack(self, expert: Any) -> Any:
        return self.Expert(*(np.asarray(array, np.float32) for array in expert))

    def ffn(self, x: jax.Array, expert: Any) -> jax.Array:
        return ffn(x, expert, self.body)

    def check(self, expert: Any) -> None:
        gate, up, down, *bias = expert
        fits = gate.ndim == 2 and gate.shape == up.shape == down.shape[::-1]
        if not fits or not gate.dtype == up.dtype == down.dtype == self.dtype:
            got = ", ".join(f"{array.dtype}{list(array.shape)}" for array in expert)
            raise ValueError(
                f"an expert is gate [F, D], up [F, D] and down [D, F] of one dtype, {self.name}, got {got}"
            )
        if bias or self.body.bias:
            super().check(expert)


@functools.cache
def plain(name: str, body: ExpertBody) -> PlainFormat:
    """Returns the format of a name and a body: one object each, since programs know `ffn` by its object."""
    return PlainFormat(name, body)


FLOAT32, BFLOAT16, FLOAT16 = (plain(name, SWIGLU) for name in DTYPES)
