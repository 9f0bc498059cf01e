"""Limits of an engine on the requests that it runs at once."""

from __future__ import annotations

from typing import Any, NamedTuple


class Limits(NamedTuple):
    """How many requests run at once, and in what; as of `OffloadConfig`."""

    max_num_seqs: int
    prefill_chunk_size: int
    prefix_cache: bool = False
    slot_tokens: int = 0

    @classmethod
    def of(cls, config: Any) -> Limits:
        """Returns those of an `OffloadConfig`."""
        sizes = {name: int(getattr(config, name)) for name in cls._fields if name != "prefix_cache"}
        return cls(**sizes, prefix_cache=config.prefix_cache)
