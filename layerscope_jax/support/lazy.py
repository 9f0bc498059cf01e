"""Imports a package's names when they are first used."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def importer(package: str, contents: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """Returns a package's `__getattr__` (PEP 562) that imports names when they are first used.

    Submodules can be used without importing them, as if all had been imported.

    Args:
        package: the package's name.
        contents: submodule -> the names that it provides.

    >>> importer("layerscope_jax", {"support.units": ["parse_bytes"]})("parse_bytes")("1KiB")
    1024
    """
    module_of = {name: module for module, names in contents.items() for name in names}

    def get(name: str) -> Any:
        if name in module_of:
            value = getattr(import_module(f"{package}.{module_of[name]}"), name)
            setattr(sys.modules[package], name, value)
            return value
        if not name.startswith("_") and find_spec(f"{package}.{name}") is not None:
            for module in contents:
                if module.startswith(f"{name}."):
                    import_module(f"{package}.{module}")
            return import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get
