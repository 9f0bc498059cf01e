"""Explains logits that are not finite: names weights that are not finite, or says that activations
overflowed."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import jax
import numpy as np

from layerscope_jax.checkpoints.dense_weights import named_arrays
from layerscope_jax.checkpoints.model import Model

NAMED = 3
"""Maximum number of tensors to name."""

PIECE = 1 << 22
"""Number of elements that are checked at once, which bounds the memory that this takes."""

EXPONENTS = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00}
"""Bits (by dtype) that are all set in NaN and infinity, and in no other value."""


def why_not_finite(model: Model) -> str:
    """Returns a sentence on why a model's logits are not finite; reads its weights until some are not finite.

    Args:
        model: the model.
    """
    tensors = list(islice(bad_tensors(model), NAMED + 1))
    if tensors:
        return (
            f"the logits hold NaN or infinity, because the weights do: {', '.join(tensors[:NAMED])}"
            f"{' and others' if len(tensors) > NAMED else ''}; load an undamaged checkpoint"
        )
    dtype = np.dtype(model.bank.dtype).name
    return (
        f"the logits hold NaN or infinity, though all weights are finite: activations overflowed {dtype}; "
        + ("check the scale of the weights" if dtype == "float32" else 'load the model with dtype="float32"')
    )


def bad_tensors(model: Model) -> Iterator[str]:
    """Yields the names of tensors with values that are not finite: dense parameters, then experts."""
    for name, array in named_arrays(model.dense):
        if not is_finite(np.asarray(array)):
            yield name
    layers = model.config.moe_layers
    for expert in model.bank:
        names = model.bank.format.Expert._fields
        for name, view in zip(names, model.bank.views(expert), strict=True):
            if not is_finite(view):
                yield f"layers.{layers[expert.layer]}.experts.{expert.expert}.{name}"


def is_finite(array: np.ndarray | jax.Array) -> bool:
    """Whether all values of an array are finite.

    >>> is_finite(np.array([1.0, -2.0], np.float32)), is_finite(np.array([1.0, np.inf], np.float16))
    (True, False)
    """
    array = np.asarray(array)
    exponent = EXPONENTS.get(array.dtype.name)
    # NumPy tests bfloat16 values one by one, but compares their bits at full speed.
    words: Any = array if exponent is None else array.view(f"u{array.itemsize}")
    words = words.T if words.flags.f_contiguous else words
    flat = words.reshape(-1)
    for start in range(0, flat.size, PIECE):
        part = flat[start : start + PIECE]
        bad = ~np.isfinite(part) if exponent is None else (part & exponent) == exponent
        if bad.any():
            return False
    return True
