"""A format of your own: experts in 8-bit floating point, with one scale for each matrix.

Run it with the model that ships with the package:

    python examples/extend/format.py

An expert takes a quarter of its float32 bytes, in memory and on the link, so four times as many fit into a
budget. Bank, link and both executors ask the format for everything; nothing else has to be written. A faster
product for it is in `kernel.py`, beside this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

import layerscope_jax as ls
from layerscope_jax.formats import Buffer, ExpertFormat, register_format
from layerscope_jax.models.experts import ExpertWeights, products_of_rows

SHIPPED = Path(ls.__file__).parent / "shipped"

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
LARGEST = 448.0
"""The largest number of E4M3."""


class Float8Expert(NamedTuple):
    """The arrays of an expert, in the order in which they cross the link."""

    gate: Any  # [F, D] E4M3
    up: Any  # [F, D] E4M3
    down: Any  # [D, F] E4M3
    scales: Any  # [3] float32: what gate, up and down are multiplied with


@dataclass(frozen=True)
class Float8(ExpertFormat):
    """E4M3 with a scale for each matrix, chosen so that its largest number is the largest of the type."""

    name: str = "float8_e4m3"

    Expert = Float8Expert

    def buffers(self, width: int, hidden: int) -> dict[str, Buffer]:
        into, out = Buffer((hidden, width), E4M3), Buffer((width, hidden), E4M3)
        return {"gate": into, "up": into, "down": out, "scales": Buffer((3,), np.dtype(np.float32))}

    def sizes(self, expert: Float8Expert) -> tuple[int, int]:
        hidden, width = expert.gate.shape
        return width, hidden

    def pack(self, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> Float8Expert:
        matrices = [np.asarray(matrix, np.float32) for matrix in (gate, up, down)]
        scales = np.array([max(np.abs(matrix).max(), 1e-30) / LARGEST for matrix in matrices], np.float32)
        codes = [(matrix / scale).astype(E4M3) for matrix, scale in zip(matrices, scales, strict=True)]
        return Float8Expert(*codes, scales)

    def unpack(self, expert: Float8Expert) -> ExpertWeights:
        *codes, scales = expert
        matrices: Any = [code.astype(np.float32) * scale for code, scale in zip(codes, scales, strict=True)]
        return ExpertWeights(*matrices)

    def ffn(self, x: jax.Array, expert: Float8Expert) -> jax.Array:
        gate, up, down = expert.scales
        inner = jax.nn.silu(gate * product(x, expert.gate)) * (up * product(x, expert.up))
        return (down * product(inner.astype(x.dtype), expert.down)).astype(x.dtype)


def product(x: jax.Array, codes: jax.Array) -> jax.Array:
    """Of rows with rows, sums in float32; every number of E4M3 is one of bfloat16 and of float32 too."""
    return products_of_rows(x, codes.astype(x.dtype))


FLOAT8 = register_format(Float8())


def main() -> None:
    """Generates within a quarter of the packed experts' bytes."""
    model = ls.load(SHIPPED, format="float8_e4m3")
    config = ls.OffloadConfig(device_budget=model.bank.total_bytes // 4, policy="lru")
    with ls.Engine(model, config) as engine:
        result = engine.generate(["The old house"], max_new_tokens=16)
    print(result.texts[0])
    print(
        f"format {result.stats.format}, kernels {result.stats.kernels}, "
        f"moved {result.stats.bytes_moved / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    main()
