"""How an expert lies in memory, and how it is multiplied there: what bank, link and kernels ask."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np

from layerscope_jax.models.experts import ExpertWeights


class Buffer(NamedTuple):
    """One array of an expert.

    Attributes:
        shape: of the array.
        dtype: of its numbers.

    >>> Buffer((2, 3), np.dtype(np.float32)).nbytes
    24
    """

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that it takes, in memory and on the link."""
        return math.prod(self.shape) * self.dtype.itemsize


class ExpertFormat(ABC):
    """How an expert lies in memory: its arrays, how floats become them, and the product with them.

    An expert in a format is a named tuple of arrays, of the class `Expert`; each array crosses the link by
    itself, in the order of its fields. A format is a value: hashable, and equal to what computes the same,
    since compiled programs are shared by it. D is the model's hidden size, F that of the expert.

    Attributes:
        name: by which statistics, profiles and `format=` arguments call it.
        Expert: the named tuple of an expert's arrays.
    """

    name: str
    Expert: ClassVar[Any]

    @abstractmethod
    def buffers(self, width: int, hidden: int) -> dict[str, Buffer]:
        """Returns the arrays of an expert by the fields of `Expert`, in their order.

        Args:
            width: D.
            hidden: F.
        """

    @abstractmethod
    def sizes(self, expert: Any) -> tuple[int, int]:
        """Returns D and F of an expert, read from the shapes of its arrays."""

    @abstractmethod
    def pack(self, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> Any:
        """Returns an `Expert` of NumPy arrays.

        Args:
            gate: [D, F] float32, bfloat16 or float16, as `up`.
            up: [D, F].
            down: [F, D].
        """

    @abstractmethod
    def unpack(self, expert: Any) -> ExpertWeights:
        """Returns the matrices that an expert of NumPy arrays stands for, in float32."""

    @abstractmethod
    def ffn(self, x: jax.Array, expert: Any) -> jax.Array:
        """Computes the expert in plain JAX: the reference that every kernel is compared with.

        A row of the result may depend on nothing but its row of `x`, and has the dtype of `x`.

        Args:
            x: [M, D] float32, bfloat16 or float16.
            expert: of arrays in one memory.

        Returns:
            [M, D] `(silu(x W_gate) * (x W_up)) W_down`.
        """

    def expert_bytes(self, width: int, hidden: int) -> int:
        """Returns the bytes of one expert."""
        return sum(buffer.nbytes for buffer in self.buffers(width, hidden).values())

    def check(self, expert: Any) -> None:
        """Compares an expert's arrays with those of the format; reads none of their numbers.

        Raises:
            ValueError: with what was expected and what came.
        """
        got = ", ".join(f"{array.dtype}{list(array.shape)}" for array in expert)
        try:
            known = self.buffers(*self.sizes(expert))
        except (AttributeError, TypeError, ValueError, IndexError):
            raise ValueError(f"expected an expert in the format {self.name!r}, got {got}") from None
        if [(array.shape, array.dtype) for array in expert] != list(known.values()):
            expected = ", ".join(f"{name} {b.dtype}{list(b.shape)}" for name, b in known.items())
            raise ValueError(f"an expert in the format {self.name!r} is {expected}, got {got}")
