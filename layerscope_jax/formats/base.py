"""Formats: how an expert is stored in memory and computed from there, as bank, link and kernels need it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import jax
import numpy as np

from layerscope_jax.models.experts import SWIGLU, BiasedWeights, ExpertBody, ExpertWeights


class Buffer(NamedTuple):
    """Shape and dtype of one array of an expert.

    Attributes:
        shape: shape of the array.
        dtype: dtype of its elements.

    >>> Buffer((2, 3), np.dtype(np.float32)).nbytes
    24
    """

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Size (bytes) of the array, in memory and on the link."""
        return math.prod(self.shape) * self.dtype.itemsize


class ExpertFormat(ABC):
    """Layout of an expert in memory: its arrays, how float matrices are packed, and how it is computed.

    An expert in a format is a named tuple of arrays, of the class `Expert`; each array is copied over the
    link separately, in the order of the fields. A format is a value: it is hashable, and formats that compute
    the same must be equal, because equal formats share compiled programs. D is the model's hidden size, F the
    expert's.

    Attributes:
        name: name in statistics, profiles and `format=` arguments.
        Expert: the named tuple of an expert's arrays.
        body: what the experts compute between their products, and whether these have biases.
    """

    name: str
    Expert: Any
    body: ExpertBody = SWIGLU

    def for_body(self, body: ExpertBody) -> ExpertFormat:
        """Returns this format for experts with another body.

        Raises:
            ValueError: if the format does not have it.
        """
        if body == self.body:
            return self
        raise ValueError(
            f"the format {self.name!r} holds experts with {self.body}, and those of this model have {body}; "
            "choose another format, or define for_body in this one"
        )

    @abstractmethod
    def buffers(self, width: int, hidden: int) -> dict[str, Buffer]:
        """Returns the shape and dtype of each array of an expert, by field of `Expert` and in field order.

        Args:
            width: D.
            hidden: F.
        """

    @abstractmethod
    def sizes(self, expert: Any) -> tuple[int, int]:
        """Returns D and F of an expert, read from the shapes of its arrays."""

    @abstractmethod
    def pack(self, gate: np.ndarray, up: np.ndarray, down: np.ndarray, *bias: np.ndarray) -> Any:
        """Returns an `Expert` of NumPy arrays, packed from float matrices.

        Args:
            gate: [F, D] float32, bfloat16 or float16; the others have the same dtype.
            up: [F, D].
            down: [D, F].
            *bias: [2 F + D], where the body has biases: those of gate, up and down.
        """

    @abstractmethod
    def unpack(self, expert: Any) -> ExpertWeights | BiasedWeights:
        """Returns the float32 matrices, and biases, that a packed expert of NumPy arrays stands for."""

    @abstractmethod
    def ffn(self, x: jax.Array, expert: Any) -> jax.Array:
        """Computes the expert in plain JAX: the reference that every kernel is compared with.

        A row of the result may depend only on the same row of `x`.

        Args:
            x: [M, D] float32, bfloat16 or float16.
            expert: an `Expert` whose arrays are all in one memory (host or device).

        Returns:
            [M, D] in the dtype of `x`, as `layerscope_jax.models.experts.ffn` computes it from float weights.
        """

    def expert_bytes(self, width: int, hidden: int) -> int:
        """Returns the size (bytes) of one expert."""
        return sum(buffer.nbytes for buffer in self.buffers(width, hidden).values())

    def check(self, expert: Any) -> None:
        """Checks the shapes and dtypes of an expert's arrays, without reading their elements.

        Raises:
            ValueError: if they are not those of the format; says what was expected and what was given.
        """
        got = ", ".join(f"{array.dtype}{list(array.shape)}" for array in expert)
        try:
            known = self.buffers(*self.sizes(expert))
        except (AttributeError, TypeError, ValueError, IndexError):
            raise ValueError(f"expected an expert in the format {self.name!r}, got {got}") from None
        if [(array.shape, array.dtype) for array in expert] != list(known.values()):
            expected = ", ".join(f"{name} {b.dtype}{list(b.shape)}" for name, b in known.items())
            raise ValueError(f"an expert in the format {self.name!r} is {expected}, got {got}")
