"""Commands and policies that other packages add through entry points."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

LOADED: dict[str, str] = {}
"""Top-level module of each loaded plugin -> the package that installed it."""


def entry_points_of(group: str) -> dict[str, EntryPoint]:
    """Returns the entry points of a group by name; of two with the same name, the first on the path.

    Nothing is imported.

    Args:
        group: "layerscope.commands" or "layerscope.policies".
    """
    from importlib.metadata import entry_points  # takes about 10 ms, which most commands save

    points: dict[str, EntryPoint] = {}
    for point in entry_points(group=group):
        points.setdefault(point.name, point)
    return points


def load(point: EntryPoint) -> Any:
    """Imports what an entry point names.

    Raises:
        ValueError: naming the entry point and its package, if it cannot be imported.
    """
    package = point.dist.name if point.dist is not None else "an unknown package"
    try:
        loaded = point.load()
    except Exception as error:  # a module can raise anything when it is imported
        raise ValueError(
            f"{point.name!r} of package {package!r} cannot be imported ({type(error).__name__}: {error}); "
            "install the package again, or remove it"
        ) from error
    LOADED[point.module.partition(".")[0]] = package
    return loaded
