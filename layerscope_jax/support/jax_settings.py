"""JAX settings that an engine computes under, independent of its caller's.

Tokens must not depend on settings that a caller made for other code, in a `with` statement or for the whole
process: number type, precision, random number generator, mesh. So each turn of an engine resets the settings
that differ, for its own thread and for the duration of the turn. The caller's setting of type and rank
promotion stays, because the engine relies on no promotion.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from operator import attrgetter
from typing import Any

import jax
import numpy as np

PRNG = "threefry2x32"
"""JAX's name of the random number generator of every key of an engine."""

GUARDED = "jax_transfer_guard_host_to_device", "jax_transfer_guard_device_to_host"

OURS: dict[str, tuple[tuple[Any, ...], Callable[[], AbstractContextManager]]] = {
    "jax_enable_x64": ((False,), lambda: jax.enable_x64(False)),
    "jax_disable_jit": ((False,), lambda: jax.disable_jit(False)),
    "jax_debug_nans": ((False,), lambda: jax.debug_nans(False)),
    "jax_debug_infs": ((False,), lambda: jax.debug_infs(False)),
    "jax_default_matmul_precision": ((None,), lambda: jax.default_matmul_precision(None)),
    "jax_default_device": ((None,), lambda: jax.default_device(None)),
    "jax_threefry_partitionable": ((True,), lambda: jax.threefry_partitionable(True)),
    GUARDED[0]: ((None, "allow"), lambda: jax.transfer_guard("allow")),
    GUARDED[1]: ((None, "allow"), lambda: jax.transfer_guard("allow")),
}
"""Settings that results depend on: the accepted values, and how to reset any other."""

_values = attrgetter(*OURS)
_ALLOWED = [allowed for allowed, _ in OURS.values()]
_NOTHING = nullcontext()
_of_thread = threading.local()


def own_settings() -> AbstractContextManager:
    """Resets the caller's settings on this thread within the `with` block; cheap if none differs."""
    changed = [
        change
        for value, allowed, (_, change) in zip(_values(jax.config), _ALLOWED, OURS.values(), strict=True)
        if value not in allowed
    ]
    if not jax.sharding.get_abstract_mesh().empty or not jax.sharding.get_mesh().empty:
        changed.append(without_mesh)
    return _all_of(changed) if changed else _NOTHING


def random_key(seed: int) -> jax.Array:
    """Returns a random key of the engine's generator, not of JAX's default one."""
    return jax.random.key(seed, impl=PRNG)


def with_promotion() -> AbstractContextManager:
    """Allows promotion of dtypes and ranks within the `with` block, for Optax; a program may forbid it."""
    return _all_of([lambda: jax.numpy_dtype_promotion("standard"), lambda: jax.numpy_rank_promotion("allow")])


def without_mesh() -> AbstractContextManager:
    # An empty one: JAX 0.9 does not take None.
    context: Any = jax.set_mesh(jax.sharding.Mesh(np.empty((), object), ()))
    return context


def settle_thread() -> None:
    """Applies these settings to the calling thread, one of the engine's own, for good."""
    _of_thread.settings = _all_of([change for _, change in OURS.values()])


def _all_of(changes: list[Callable[[], AbstractContextManager]]) -> ExitStack:
    stack = ExitStack()
    try:
        for change in changes:
            stack.enter_context(change())
    except BaseException:
        stack.close()
        raise
    return stack
