"""Has XLA optimise little, in this process and in those that tests start: compiling takes half the time."""

import os
from collections.abc import Callable

import jax
from jax._src import compiler

OPTIONS = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}
"""Beside JAX's own setting: these two save more than half of the time that is then left."""

KNOWN = jax.__version_info__ >= (0, 10)
"""Whether this JAX is one whose XLA is known to have them."""

ENVIRONMENT = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
"""For processes: what they compile so is shared among them."""

if KNOWN:
    flags = (f"--{name}={str(value).lower()}" for name, value in OPTIONS.items())
    ENVIRONMENT["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags]).strip()


def _with_options(get: Callable) -> Callable:
    """JAX's function of a program's options, with ours; XLA_FLAGS could not change within a process."""

    def options(*arguments: object, **named: object):
        found = get(*arguments, **named)
        if jax.config.values["jax_disable_most_optimizations"]:
            found.env_option_overrides = [*found.env_option_overrides, *OPTIONS.items()]
        return found

    return options


if KNOWN:
    compiler.get_compile_options = _with_options(compiler.get_compile_options)


def compile_quickly(quickly: bool) -> None:
    """Has XLA optimise little, or as for users; no program of the one kind is used by tests of the other."""
    if jax.config.values["jax_disable_most_optimizations"] != quickly:
        jax.config.update("jax_disable_most_optimizations", quickly)
        jax.clear_caches()
