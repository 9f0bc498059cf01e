"""PCA of each layer's hidden states: streaming, on the device, fitted only to training documents."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save

from layerscope_jax.support.files import write_file

FILE = "pca.safetensors"


@dataclass(frozen=True)
class Basis:
    """A reduction of hidden states: `(x - mean) @ components`.

    Attributes:
        mean: [L, D] float32.
        components: [L, D, P] float32, orthonormal columns, most variance first; the first p are the PCA of
            width p.
        variance: [L, P] float32 variance of each component.
    """

    mean: np.ndarray
    components: np.ndarray
    variance: np.ndarray

    @property
    def width(self) -> int:
        return self.components.shape[2]

    def save(self, folder: Path) -> None:
        write_file(folder / FILE, save(vars(self)))

    @classmethod
    def load(cls, folder: Path) -> Basis:
        """Reads a PCA; raises ValueError if the folder has none, or a damaged one."""
        try:
            kept = load_file(folder / FILE)
            mean, components, variance = (kept[field.name] for field in fields(cls))
            layers, hidden = mean.shape
            width = variance.shape[-1]
            if components.shape != (layers, hidden, width) or variance.shape != (layers, width) or not width:
                raise ValueError(f"shapes {[array.shape for array in (mean, components, variance)]}")
            if not all(np.isfinite(array).all() for array in (mean, components, variance)):
                raise ValueError("numbers that are not finite")
            return cls(mean, components, variance)
        except Exception as error:  # safetensors raises nothing narrower
            raise ValueError(f"{folder / FILE}: expected a PCA basis, got {error}; record it anew") from None


@dataclass(frozen=True)
class Moments:
    """Sums over rows from which a PCA is computed, in bounded memory: [L], [L, D], [L, D, D].

    They are sums of `x - shift`, with the mean of the first rows as shift: with a mean far from zero, the
    difference of two large sums would have no accurate digits.

    >>> rows = jnp.array([[[1.0, 0.0]], [[-1.0, 0.0]], [[3.0, 0.5]]])  # [N, L, D]
    >>> basis = Moments.start(rows).add(rows).basis(1)
    >>> basis.mean.shape, [round(abs(float(x)), 2) for x in basis.components[0, :, 0]]
    ((1, 2), [0.99, 0.12])
    """

    shift: jax.Array  # [L, D]
    rows: int
    first: jax.Array  # [L, D]
    second: jax.Array  # [L, D, D]

    @classmethod
    def start(cls, hidden: jax.Array) -> Moments:
        """Returns moments of no rows; `hidden` [N, L, D] only sets the shift."""
        _, layers, width = hidden.shape
        zeros = jnp.zeros((layers, width), jnp.float32)
        second = jnp.zeros((layers, width, width), jnp.float32)
        return cls(hidden.astype(jnp.float32).mean(0), 0, zeros, second)

    def add(self, hidden: jax.Array) -> Moments:
        """Adds the rows `hidden` [N, L, D]."""
        first, second = _add(self.first, self.second, hidden, self.shift)
        return Moments(self.shift, self.rows + hidden.shape[0], first, second)

    def basis(self, width: int) -> Basis:
        """Returns the PCA with `width` components, at most D.

        Raises:
            ValueError: if there were fewer than two rows, or one was not finite.
        """
        if self.rows < 2:
            raise ValueError(f"a PCA needs two rows or more, got {self.rows}; record more training text")
        first, second = (np.asarray(x, np.float64) / self.rows for x in (self.first, self.second))
        finite = np.isfinite(second).all((1, 2))
        if not finite.all():
            raise ValueError(f"hidden states of layers {np.flatnonzero(~finite).tolist()} are not finite")
        covariance = second - first[:, :, None] * first[:, None, :]
        values, vectors = np.linalg.eigh(covariance)  # rising
        width = min(width, covariance.shape[1])
        return Basis(
            mean=(first + np.asarray(self.shift, np.float64)).astype(np.float32),
            components=np.ascontiguousarray(vectors[:, :, ::-1][:, :, :width], np.float32),
            variance=np.maximum(values[:, ::-1][:, :width], 0).astype(np.float32),
        )


@jax.jit
def _add(first: jax.Array, second: jax.Array, hidden: jax.Array, shift: jax.Array):
    centred = hidden.astype(jnp.float32) - shift[None]
    return first + centred.sum(0), second + jnp.einsum("nld,nle->lde", centred, centred)


@jax.jit
def reduce(hidden: jax.Array, mean: jax.Array, components: jax.Array) -> jax.Array:
    """Returns hidden states [N, L, D] reduced to [N, L, P]."""
    return jnp.einsum("nld,ldp->nlp", hidden.astype(jnp.float32) - mean[None], components)
