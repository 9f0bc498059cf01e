"""What computes the parts of a decode step that are no experts: set while a program is traced, and named."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import jax
import numpy as np

from layerscope_jax.kernels import packed_products  # noqa: F401 registers kernels
from layerscope_jax.kernels.attention import attention
from layerscope_jax.kernels.delta_memory import delta_memory
from layerscope_jax.kernels.head_products import head_products
from layerscope_jax.kernels.latent_attention import latent_attention
from layerscope_jax.kernels.products import products
from layerscope_jax.kernels.registry import REFERENCE, Kind, Work, choose
from layerscope_jax.models.attention import attending_by
from layerscope_jax.models.config import DeltaSizes
from layerscope_jax.models.delta_net import remembering_by
from layerscope_jax.models.experts import products_by
from layerscope_jax.models.latent_attention import head_products_by, latent_attending_by
from layerscope_jax.models.rotary import cosines_apart


@contextlib.contextmanager
def our_loops(table: jax.Array | None) -> Iterator[None]:
    """While a CPU's program is traced within, attention and products go by our own loops, given a table."""
    if table is None:
        yield
        return
    with (
        products_by(functools.partial(products, table)),
        attending_by(functools.partial(attention, table)),
        latent_attending_by(functools.partial(latent_attention, table)),
        head_products_by(functools.partial(head_products, table)),
        remembering_by(functools.partial(delta_memory, table)),
        cosines_apart(),
    ):
        yield


def dense_kernels(
    hidden_size: int,
    dtype: np.dtype,
    in_programs: bool,
    latent: bool,
    dense_format: str | None = None,
    delta: DeltaSizes | None = None,
) -> dict[str, str]:
    """Returns the name of what computes each part: products of D by D, attention, the sums over experts, and
    the memory of gated DeltaNet where a model has any.

    Args:
        hidden_size: D.
        dtype: of activations.
        in_programs: whether programs can call our own loops here (`Inside.table`).
        latent: whether attention is latent.
        dense_format: format that the matrices of dense layers are packed in; None if they are plain.
        delta: sizes of gated DeltaNet; None for a model without.

    >>> dense_kernels(64, np.dtype(np.float32), in_programs=False, latent=False)
    {'products': 'xla', 'attention': 'xla', 'sums': 'xla'}
    """
    attends: Kind = "latent_attention" if latent else "attention"
    caches = "float32"  # on a CPU
    parts = {
        "products": Work("products", dense_format or dtype.name, dtype, (hidden_size, hidden_size)),
        "attention": Work(attends, caches, dtype, (1, 1, 1, 1)),  # a token a row: any size suits
        "sums": Work("sums", dtype.name, dtype, (hidden_size,)),
    }
    if delta is not None:
        parts["delta_memory"] = Work("delta_memory", caches, np.dtype(caches), (delta.key, delta.value))
    kernels = {name: choose(work) if in_programs else None for name, work in parts.items()}
    return {name: REFERENCE if kernel is None else kernel.name for name, kernel in kernels.items()}
