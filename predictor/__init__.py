"""LLaPor: a learned, layer-aware predictor of expert activation."""

from predictor.llapor import LLaPor

load = LLaPor.load

__all__ = ["LLaPor", "load"]
