"""What to say of logits that are not finite: which weights are not, or that activations overflowed."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from layerscope_jax.checkpoints.model import Model

NAMED = 3
"""Tensors that are named, of however many."""

PIECE = 1 << 22
"""Numbers looked at in one go, which bounds the memory that looking takes."""

EXPONENTS = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00}
"""Bits that are all set in NaN and infinity, and in no other number."""


def why_not_finite(model: Model) -> str:
    """A sentence on why logits of a model are not finite; reads all its weights, up to the first bad ones.

    Args:
        model: with any weights, these or others.
    """
    found = list(islice(bad_tensors(model), NAMED + 1))
    if found:
        return (
            f"the logits hold NaN or infinity, because the weights do: {', '.join(found[:NAMED])}"
            f"{' and others' if len(found) > NAMED else ''}; load an undamaged checkpoint"
        )
    dtype = np.dtype(model.bank.dtype).name
    return (
        f"the logits hold NaN or infinity, though all weights are finite: activations overflowed {dtype}; "
        + ("check the scale of the weights" if dtype == "float32" else 'load the model with dtype="float32"')
    )


def bad_tensors(model: Model) -> Iterator[str]:
    """Names of the tensors with a number that is not finite: dense parameters, then experts."""
    for path, array in flatten_dict(model.dense).items():
        if not is_finite(np.asarray(array)):
            yield ".".join(map(str, path))
    layers = model.config.moe_layers
    for expert in model.bank:
        for name, matrix in model.bank[expert]._asdict().items():
            # Through another handle on the buffer: JAX keeps with an array whatever copy NumPy was given.
            if not is_finite(np.asarray(matrix.addressable_data(0))):
                yield f"layers.{layers[expert.layer]}.experts.{expert.expert}.{name}"


def is_finite(array: np.ndarray | jax.Array) -> bool:
    """Whether all numbers of an array are.

    >>> is_finite(np.array([1.0, -2.0], np.float32)), is_finite(np.array([1.0, np.inf], np.float16))
    (True, False)
    """
    array = np.asarray(array)
    exponent = EXPONENTS.get(array.dtype.name)
    # NumPy looks at bfloat16 one by one; at its bits as fast as they come.
    words: Any = array if exponent is None else array.view(f"u{array.itemsize}")
    words = words.T if words.flags.f_contiguous else words
    flat = words.reshape(-1)
    for start in range(0, flat.size, PIECE):
        part = flat[start : start + PIECE]
        bad = ~np.isfinite(part) if exponent is None else (part & exponent) == exponent
        if bad.any():
            return False
    return True
