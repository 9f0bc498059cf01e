"""Flax decoders and the Hugging Face families they stand for."""

from layerscope_jax.models.cache import KVCache
from layerscope_jax.models.config_reader import ConfigReader
from layerscope_jax.models.decoder import Decoder
from layerscope_jax.models.family import Family
from layerscope_jax.models.layers import ExpertParam
from layerscope_jax.models.registry import FAMILIES, config_from_hf, register_family, with_generation
from layerscope_jax.models.weights import Weight

__all__ = [
    "FAMILIES",
    "ConfigReader",
    "Decoder",
    "ExpertParam",
    "Family",
    "KVCache",
    "Weight",
    "config_from_hf",
    "register_family",
    "with_generation",
]
