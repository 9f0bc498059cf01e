"""The parts a decoder layer may be made of, by name: what a `ModelConfig` says a layer consists of.

The parts that families share enter themselves where they are defined; a family from outside brings its own
(`Family.attentions`, `Family.feed_forwards`).
"""

from __future__ import annotations

from typing import Any

ATTENTIONS: dict[str, Any] = {}
"""Kind of attention -> its module, made and called as `layers.Attention`, with a `cache_shapes` as it has."""

FEED_FORWARDS: dict[str, Any] = {}
"""Kind of feed-forward part -> the decoder layer that has it: a subclass of `decoder_layers.DenseLayer` or
`decoder_layers.RoutedLayer`."""
