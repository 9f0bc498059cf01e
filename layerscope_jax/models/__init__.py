"""Flax decoders."""
