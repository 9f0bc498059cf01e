"""What every test runs under. JAX reads these when it first makes an array, so they are set here."""

import os

import jax
import pytest

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes may share one GPU

jax.config.update("jax_num_cpu_devices", 2)  # the second stands for the host beside an accelerator
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_enable_compilation_cache", False)  # no earlier run has a part in this one

collect_ignore_glob = ["*conftest.py"]  # has no doctests, and there are several of that name


@pytest.fixture(scope="module")
def quick_compiles():
    """For tests that compare numbers to a tolerance, or one program with itself: XLA optimises little.

    That takes two thirds of the time. Tests that compare the bits of several programs need it as users do.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()  # no other test gets its programs
