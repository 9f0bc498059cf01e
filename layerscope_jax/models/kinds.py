"""The parts a decoder layer may be made of, by name: what a `ModelConfig` says a layer consists of.

`decoder_layers` enters the parts that families share; a family from outside brings its own
(`Family.attentions`, `Family.feed_forwards`).
"""

from __future__ import annotations

from typing import Any

ATTENTIONS: dict[str, Any] = {}
"""Kind of attention -> its module, made and called as `attention.Attention`, with such a `cache_shapes`."""

FEED_FORWARDS: dict[str, Any] = {}
"""Kind of feed-forward part -> the decoder layer that has it: a subclass of `decoder_layers.DenseLayer` or
`decoder_layers.RoutedLayer`."""
