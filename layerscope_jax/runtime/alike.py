"""Programs that every device of a mesh runs alike, on what each of them holds."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from layerscope_jax.offload.split_rows import SplitRows


def alike(function: Callable, mesh: Mesh | None, static: str = "") -> Callable:
    """Returns a function that each device of a mesh computes by itself, from arguments that each holds.

    Only rows that devices share (`SplitRows`) differ between them; what the function makes of these must be
    the same on all. XLA then has nothing to part, and computes on each device what it would compute on one.

    Args:
        function: of arrays and of `static`.
        mesh: of the devices; None for the function as it is, on one device.
        static: name of the argument that is no array.
    """
    if mesh is None:
        return function
    places = {name: place for place, name in enumerate(inspect.signature(function).parameters)}
    place = places.get(static)

    @functools.wraps(function)
    def run(*given: Any, **named: Any) -> Any:
        fixed = dict(named)
        arrays = list(given)
        if place is not None and len(arrays) > place:
            fixed[static] = arrays.pop(place)
        # Arguments behind the static one would lose their places.
        assert place is None or len(given) <= place + 1
        specs = jax.tree.map(spec_of, tuple(arrays), is_leaf=is_split)
        body = jax.shard_map(
            lambda *local: function(*local, **fixed),
            mesh=mesh,
            in_specs=specs,
            out_specs=PartitionSpec(),
            check_vma=False,
        )
        return body(*arrays)

    return run


def is_split(value: Any) -> bool:
    return isinstance(value, SplitRows)


def spec_of(value: Any) -> Any:
    return value.specs if is_split(value) else PartitionSpec()
