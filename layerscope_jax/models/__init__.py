"""Flax decoders and the Hugging Face families they stand for."""

from layerscope_jax.models.decoder import Decoder
from layerscope_jax.models.layers import ExpertParam, KVCache
from layerscope_jax.models.registry import FAMILIES, config_from_hf, with_generation

__all__ = ["FAMILIES", "Decoder", "ExpertParam", "KVCache", "config_from_hf", "with_generation"]
