"""LLaPor: a learned, layer-aware predictor of expert activation.

Names are imported when they are first asked for, as those of `layerscope_jax`.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from predictor.llapor import LLaPor
    from predictor.online import Online
    from predictor.tuning import TuningConfig

SHIPPED = Path(__file__).parent / "shipped"

_MODULE_OF = {"LLaPor": "llapor", "Online": "online", "TuningConfig": "tuning"}


def load(folder: str | Path) -> LLaPor:
    """Loads a trained predictor; see `LLaPor.load`."""
    from predictor.llapor import LLaPor

    return LLaPor.load(folder)


def shipped() -> LLaPor:
    """The predictor that comes with the shipped model, and is for no other."""
    return load(SHIPPED)


if not TYPE_CHECKING:  # with it any name would do

    def __getattr__(name: str) -> Any:
        if name in _MODULE_OF:
            found = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
            globals()[name] = found
            return found
        if not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = ["SHIPPED", "LLaPor", "Online", "TuningConfig", "load", "shipped"]
