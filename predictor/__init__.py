"""LLaPor: a learned, layer-aware predictor of expert activation."""

from pathlib import Path

from predictor.llapor import LLaPor
from predictor.online import Online
from predictor.tuning import TuningConfig

SHIPPED = Path(__file__).parent / "shipped"


def load(folder: str | Path) -> LLaPor:
    """Loads a trained predictor; see `LLaPor.load`."""
    return LLaPor.load(folder)


def shipped() -> LLaPor:
    """The predictor that comes with the shipped model, and is for no other."""
    return LLaPor.load(SHIPPED)


__all__ = ["SHIPPED", "LLaPor", "Online", "TuningConfig", "load", "shipped"]
