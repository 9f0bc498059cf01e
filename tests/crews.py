"""Crews of threads that programs of tests are helped by, and how closely their results agree with XLA's."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from layerscope_jax.formats import format_named
from layerscope_jax.kernels import crew
from layerscope_jax.kernels.cpu import CpuExperts
from layerscope_jax.kernels.host_kernels import kernel_of
from layerscope_jax.kernels.inside import Inside

TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2}
"""Of sums of size 1 to 3: a few units in the last place."""


@functools.cache
def table(threads):
    """A crew of so many, one of them the caller."""
    computer = CpuExperts(threads, kernel_of(format_named("float32"), np.dtype(np.float32), 32, 20))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crew, "WORTH_BYTES", 1)
        made = Inside(computer, "float32", np.dtype(np.float32))
    return made, jnp.asarray(made.table)
