"""What numerics="exact" needs: what XLA is told, and which models and machines it can be promised for."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from layerscope_jax.checkpoints.model import Model
from layerscope_jax.kernels.inside import Inside
from layerscope_jax.support.checks import Problems

OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": ""}
"""XLA's CPU backend gives some reductions to a library, by their number of rows: so it does not."""


@functools.cache
def options() -> dict[str, str] | None:
    """Returns `OPTIONS`; None where this version of XLA does not have them."""
    try:
        jax.jit(lambda x: x + 1, compiler_options=OPTIONS).lower(jnp.zeros(1)).compile()
    except jax.errors.JaxRuntimeError:
        return None
    return OPTIONS


def check_exact(model: Model, inside: Inside | None) -> None:
    """Refuses a model or a machine that numerics="exact" cannot be promised for.

    Raises:
        ValueError: naming everything that stands against it.
    """
    problems, platform = Problems(), model.device.platform
    problems.expect(platform == "cpu", "the device", "a CPU", platform)
    if options() is None:
        problems.add(f"JAX {jax.__version__} does not have XLA's options {', '.join(OPTIONS)}")
    if platform == "cpu" and (inside is None or inside.target is None):
        form, dtype = model.bank.format.name, model.bank.dtype.name
        problems.add(f"experts in {form} with activations in {dtype} are not computed by our own loops here")
    problems.raise_any("numerics='exact'", "leave numerics at 'auto'")
