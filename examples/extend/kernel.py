"""A kernel of your own: the float8 experts of `format.py`, multiplied on the host as they lie.

Run it with the model that ships with the package:

    python examples/extend/kernel.py

The reference of the format widens a matrix before it multiplies it. This kernel looks each number up where it
is needed, and so reads a byte for a weight. It says what it can do (`suits`) and what keeps it from working
(`obstacle`); where it cannot, the reference computes, and the statistics say why.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numba import config, njit

sys.path.insert(0, str(Path(__file__).parent.resolve()))

from format import E4M3, Float8Expert, main

from layerscope_jax.kernels import Kernel, Work, register_kernel

VALUES = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)
"""What each byte stands for."""


@njit(nogil=True, fastmath={"contract", "reassoc"})
def multiply(x: np.ndarray, codes: np.ndarray, scale: float, values: np.ndarray, outputs: np.ndarray) -> None:
    """Rows of `x` [M, K] with rows of `codes` [N, K]: a row's sums do not depend on the other rows."""
    for m in range(len(x)):
        for n in range(len(codes)):
            total = np.float32(0)
            for k in range(codes.shape[1]):
                total += x[m, k] * values[codes[n, k]]
            outputs[m, n] = total * scale


def run(inputs: np.ndarray, expert: Float8Expert, outputs: np.ndarray) -> None:
    """Computes an expert's rows; see `layerscope_jax.kernels.Kernel`."""

    def product(x: np.ndarray, codes: np.ndarray, scale: np.float32) -> np.ndarray:
        sums = np.empty((len(x), len(codes)), np.float32)
        multiply(x, codes.view(np.uint8), scale, VALUES, sums)
        return sums

    x, (gate, up, down) = inputs.astype(np.float32), expert.scales
    gates, ups = product(x, expert.gate, gate), product(x, expert.up, up)
    inner = (gates / (1 + np.exp(-gates)) * ups).astype(inputs.dtype)  # rounded where the reference rounds
    outputs[...] = product(inner.astype(np.float32), expert.down, down)


def suits(work: Work) -> bool:
    """Any sizes and any type of activations, in this format, on a CPU."""
    return work.format == "float8_e4m3" and work.platform == "cpu"


def obstacle(work: Work) -> str | None:
    """Without numba's compiler the loops would run in Python."""
    return (
        "float8-lookup needs numba's compiler, and NUMBA_DISABLE_JIT is set" if config.DISABLE_JIT else None
    )


KERNEL = register_kernel(Kernel("float8-lookup", "experts", suits, run, obstacle))

if __name__ == "__main__":
    main()
