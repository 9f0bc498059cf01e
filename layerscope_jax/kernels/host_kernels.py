"""Our own loops for experts in this machine's memory: what each can do, and what numba compiles for it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numba import from_dtype, types

from layerscope_jax.formats import ExpertFormat, QuantisedFormat, format_named
from layerscope_jax.kernels import amx, encoded, encodings, loops, vectors
from layerscope_jax.kernels.activations import ACTIVATIONS
from layerscope_jax.kernels.registry import Kernel, Work, built_in, choose
from layerscope_jax.support import target

WORDS: dict[str, np.dtype] = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(np.uint16)}
"""What our own loops take activations of a dtype for, and weights of a plain format."""


class AddressKernel(NamedTuple):
    """Loops that compute experts in plain formats, or in encoded ones, given the addresses of their matrices.

    Attributes:
        name: as in statistics.
        piece: rows of an expert that it computes at a time.
        run: compiled, as that of `loops.experts_by`.
        scratch_bytes: compiled: bytes of scratch that a call of `run` needs.
        weights: what it takes bfloat16 weights for (`dots.py`).
        encoded: whether it takes encoded formats, and no plain ones.
    """

    name: str
    piece: int
    run: Any
    scratch_bytes: Any
    weights: np.dtype = WORDS["bfloat16"]
    encoded: bool = False

    def words(self, format: str, dtype: np.dtype) -> np.dtype:
        """Returns what it takes weights of a format for, or writes them out as for activations of a dtype.

        Raises:
            ValueError: for a format that it does not take.
        """
        if self.encoded:
            format = dtype.name
        if format not in WORDS:
            raise ValueError(f"the kernel {self.name!r} takes experts in {', '.join(WORDS)}, got {format!r}")
        return WORDS["float32"] if format == "float32" else self.weights


class RowsKernel(NamedTuple):
    """A registered kernel that computes one expert after the other.

    Attributes:
        name: as in statistics.
        run: `run(inputs, expert, outputs)`, as of a `Kernel` for experts on a CPU.
    """

    name: str
    run: Callable[[np.ndarray, Any, np.ndarray], None]


LOOPS = AddressKernel("loops", loops.PIECE, loops.run_experts, loops.no_scratch)
PAIRS = AddressKernel("pairs", loops.PIECE, loops.run_experts, loops.no_scratch, np.dtype(np.int16))
AMX = AddressKernel("amx", amx.PIECE, amx.run_experts, amx.scratch_bytes)
KERNELS = (LOOPS, PAIRS, AMX)
ENCODED = tuple(
    kernel._replace(run=encoded.by_tiles if kernel is AMX else encoded.by_dots, encoded=True)
    for kernel in KERNELS
)
"""The same of encoded formats: plain loops for what was written out."""


def suits(kernel: AddressKernel, work: Work) -> bool:
    """Whether a kernel can compute experts, compiled for this CPU."""
    if work.platform != "cpu" or work.dtype.name not in WORDS or work.body.activation not in ACTIVATIONS:
        return False
    if kernel.encoded:
        format = format_named(work.format) if work.format not in WORDS else None
        if not isinstance(format, QuantisedFormat) or not encodings.suit(format, *work.sizes):
            return False
    elif work.format not in WORDS:
        return False
    if kernel.name == LOOPS.name:
        return True
    same = kernel.encoded or work.format == work.dtype.name
    return same and (amx if kernel.name == AMX.name else vectors).suit(work.dtype, *work.sizes)


def obstacle(kernel: AddressKernel, work: Work) -> str | None:
    """Why numba cannot compile a kernel for experts; None if it can, and has."""
    return not_compiled(kernel, work.dtype.name if kernel.encoded else work.format, work.dtype.name)


@functools.cache
def not_compiled(kernel: AddressKernel, format: str, dtype: str) -> str | None:
    reason = target.refusal()
    if reason is not None:
        return reason
    rows, weights = (from_dtype(words) for words in (WORDS[dtype], kernel.words(format, np.dtype(dtype))))
    whole, number = types.int64[::1], types.int64
    body = number, types.float32  # activation and limit
    signature = [types.int64[:, ::1], whole, whole, types.int32[::1], number, number, number, *body]
    try:
        kernel.run.compile((*signature, rows[:, ::1], weights[::1], number, number))
        kernel.scratch_bytes.compile((whole, whole, number, number))
    except Exception as error:  # whatever numba and LLVM raise
        return f"{type(error).__name__}: {error}"
    return None


for _kernel in (*KERNELS, *ENCODED):
    built_in(
        Kernel(
            _kernel.name,
            "experts",
            functools.partial(suits, _kernel),
            _kernel,
            functools.partial(obstacle, _kernel),
            any_body=True,
        )
    )


def addresses_of(format: ExpertFormat, arrays: Any, pointers: Sequence[int]) -> list[int]:
    """Returns what the loops are given of an expert.

    Args:
        format: of the expert.
        arrays: of it.
        pointers: where the numbers of each array begin.
    """
    if isinstance(format, QuantisedFormat):
        width, hidden = format.sizes(arrays)
        if encodings.suit(format, width, hidden):
            return encoded.addresses_of(format, width, hidden, pointers)
    return [*pointers, 0][: loops.ARRAYS]


def kernel_of(
    format: ExpertFormat, dtype: np.dtype, width: int, hidden: int
) -> AddressKernel | RowsKernel | None:
    """Chooses what computes experts [D, F] on this CPU; None for the format's own reference.

    Args:
        format: of the experts.
        dtype: of their inputs and outputs.
        width: D.
        hidden: F.
    """
    chosen = choose(Work("experts", format.name, np.dtype(dtype), (width, hidden), body=format.body))
    if chosen is None:
        return None
    return chosen.run if isinstance(chosen.run, AddressKernel) else RowsKernel(chosen.name, chosen.run)
