"""Three matrices of one floating point type: the format that all others are packed from, and unpack to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layerscope_jax.formats.base import Buffer, ExpertFormat
from layerscope_jax.models.experts import ExpertWeights, ffn

DTYPES = {name: np.dtype(getattr(jnp, name)) for name in ("float32", "bfloat16", "float16")}


@dataclass(frozen=True)
class PlainFormat(ExpertFormat):
    """Three matrices in a floating point type.

    Attributes:
        name: of the type.

    >>> BFLOAT16.expert_bytes(2048, 1408) == 3 * 2048 * 1408 * 2
    True
    >>> BFLOAT16.buffers(4, 2)["down"]
    Buffer(shape=(2, 4), dtype=dtype(bfloat16))
    """

    name: str

    Expert = ExpertWeights

    @property
    def dtype(self) -> np.dtype:
        """Of the matrices."""
        return DTYPES[self.name]

    def buffers(self, width: int, hidden: int) -> dict[str, Buffer]:
        wide, narrow = Buffer((width, hidden), self.dtype), Buffer((hidden, width), self.dtype)
        return {"gate": wide, "up": wide, "down": narrow}

    def sizes(self, expert: ExpertWeights) -> tuple[int, int]:
        width, hidden = expert.gate.shape
        return width, hidden

    def pack(self, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> ExpertWeights:
        matrices: Any = [np.asarray(matrix, self.dtype) for matrix in (gate, up, down)]
        return ExpertWeights(*matrices)

    def unpack(self, expert: ExpertWeights) -> ExpertWeights:
        matrices: Any = [np.asarray(matrix, np.float32) for matrix in expert]
        return ExpertWeights(*matrices)

    def ffn(self, x: jax.Array, expert: ExpertWeights) -> jax.Array:
        if x.dtype == self.dtype:
            return ffn(x, expert)
        gate, up = (product(x, matrix) for matrix in (expert.gate, expert.up))
        return product((jax.nn.silu(gate) * up).astype(x.dtype), expert.down).astype(x.dtype)

    def check(self, expert: ExpertWeights) -> None:
        gate, up, down = expert
        fits = gate.ndim == 2 and gate.shape == up.shape == down.shape[::-1]
        if not fits or not gate.dtype == up.dtype == down.dtype == self.dtype:
            got = ", ".join(f"{matrix.dtype}{list(matrix.shape)}" for matrix in expert)
            raise ValueError(
                f"an expert is gate [D, F], up [D, F] and down [F, D] of one dtype, {self.name}, got {got}"
            )


def product(x: jax.Array, weights: jax.Array) -> jax.Array:
    """Computes `x @ weights` of two types, in float32."""
    return jnp.matmul(x.astype(jnp.float32), weights.astype(jnp.float32))


FLOAT32, BFLOAT16, FLOAT16 = (PlainFormat(name) for name in DTYPES)
