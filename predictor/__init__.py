"""LLaPor: a learned, layer-aware predictor of expert activation.

Names are imported when they are first used, as in `layerscope_jax`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from layerscope_jax.support.lazy import importer

if TYPE_CHECKING:
    from predictor.llapor import LLaPor
    from predictor.online import Online
    from predictor.tuning import TuningConfig

SHIPPED = Path(__file__).parent / "shipped"

_CONTENTS = {"llapor": ("LLaPor",), "online": ("Online",), "tuning": ("TuningConfig",)}


def load(folder: str | Path) -> LLaPor:
    """Loads a trained predictor; see `LLaPor.load`."""
    from predictor.llapor import LLaPor

    return LLaPor.load(folder)


def shipped() -> LLaPor:
    """Loads the predictor of the shipped model, which works for no other model."""
    return load(SHIPPED)


if not TYPE_CHECKING:  # type checkers would accept any name
    __getattr__ = importer(__name__, _CONTENTS)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = ["SHIPPED", "LLaPor", "Online", "TuningConfig", "load", "shipped"]
