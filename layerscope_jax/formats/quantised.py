"""Experts whose matrices are stored in fewer bits: one format for each encoding of a matrix."""

from __future__ import annotations

import functools
from collections import namedtuple
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from layerscope_jax.formats.base import Buffer, ExpertFormat
from layerscope_jax.formats.encoding import FLOAT32, Encoding
from layerscope_jax.formats.fp8 import Fp8
from layerscope_jax.formats.int4 import Int4
from layerscope_jax.formats.int8 import Int8
from layerscope_jax.formats.mxfp4 import Mxfp4
from layerscope_jax.formats.nvfp4 import Nvfp4
from layerscope_jax.models.experts import (
    SWIGLU,
    BiasedWeights,
    ExpertBody,
    ExpertWeights,
    ffn,
    weights_type,
)

MATRICES = ("gate", "up", "down")
ENCODINGS: tuple[Any, ...] = (Int8, Int4, Mxfp4, Fp8, Nvfp4)


@dataclass(frozen=True)
class QuantisedFormat(ExpertFormat):
    """Three encoded matrices, each as its arrays in a row, then the biases in float32 where there are any.

    What it computes is defined as the plain product with the matrices that the arrays stand for, rounded to
    the dtype of the activations.

    Attributes:
        encoding: of each matrix.

    >>> known = quantised(Int8())
    >>> known.Expert._fields
    ('gate_q', 'gate_scale', 'up_q', 'up_scale', 'down_q', 'down_scale')
    >>> known.expert_bytes(2048, 1408) == 3 * 2048 * 1408 + 4 * (2 * 1408 + 2048)
    True
    """

    name: str
    encoding: Encoding = field(repr=False)
    body: ExpertBody = field(default=SWIGLU, repr=False)

    @property
    def Expert(self) -> Any:
        return expert_type(self.encoding.fields, self.body.bias)

    def for_body(self, body: ExpertBody) -> QuantisedFormat:
        return quantised(self.encoding, body)

    def matrices(self, expert: Any) -> dict[str, tuple[Any, ...]]:
        """Returns the arrays of each matrix of an expert, by the matrix's name."""
        count = len(self.encoding.fields)
        return {name: tuple(expert[i * count : (i + 1) * count]) for i, name in enumerate(MATRICES)}

    def buffers(self, width: int, hidden: int) -> dict[str, Buffer]:
        into, out = self.encoding.arrays(hidden, width), self.encoding.arrays(width, hidden)
        bias = [Buffer((2 * hidden + width,), FLOAT32)] if self.body.bias else []
        return dict(zip(self.Expert._fields, (*into, *into, *out, *bias), strict=True))

    def sizes(self, expert: Any) -> tuple[int, int]:
        hidden, width = self.encoding.shape(self.matrices(expert)["gate"])
        return width, hidden

    def pack(self, gate: np.ndarray, up: np.ndarray, down: np.ndarray, *bias: np.ndarray) -> Any:
        arrays = [array for matrix in (gate, up, down) for array in self.encoding.pack(matrix)]
        return self.Expert(*arrays, *(np.asarray(array, np.float32) for array in bias))

    def unpack(self, expert: Any) -> ExpertWeights | BiasedWeights:
        matrices = [self.encoding.values(arrays) for arrays in self.matrices(expert).values()]
        return weights_type(self.body)(*matrices, *self._bias(expert))

    def ffn(self, x: jax.Array, expert: Any) -> jax.Array:
        dtype = np.dtype(x.dtype)
        matrices = [self.encoding.dequantised(arrays, dtype) for arrays in self.matrices(expert).values()]
        return ffn(x, weights_type(self.body)(*matrices, *self._bias(expert)), self.body)

    def _bias(self, expert: Any) -> Sequence[Any]:
        return expert[-1:] if self.body.bias else ()


@functools.cache
def expert_type(fields: tuple[str, ...], bias: bool) -> Any:
    """Returns the named tuple of an expert whose matrices have arrays of these names."""
    names = [f"{matrix}_{array}" for matrix in MATRICES for array in fields]
    return namedtuple("QuantisedExpert", names + ["bias"] * bias)  # type: ignore[misc]


@functools.cache
def quantised(encoding: Encoding, body: ExpertBody = SWIGLU) -> QuantisedFormat:
    """Returns the format of an encoding and a body: one object each, as programs know `ffn` by its object."""
    return QuantisedFormat(encoding.name, encoding, body)


def quantised_named(name: str) -> QuantisedFormat | None:
    """Returns the format of a name, which says what its encoding is; None if it is not one of these.

    >>> quantised_named("int4-g128-bfloat16").encoding
    Int4(group=128, scale='bfloat16', zeros=False)
    """
    encodings = (kind.named(name) for kind in ENCODINGS)
    return next((quantised(encoding) for encoding in encodings if encoding is not None), None)
