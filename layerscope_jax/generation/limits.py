"""Limits of an engine on the requests that it runs at once."""

from __future__ import annotations

from typing import Any, NamedTuple


class Limits(NamedTuple):
    """How many requests run at once, and in what; as of `OffloadConfig`, whose `numerics` may be "exact"."""

    max_num_seqs: int
    prefill_chunk_size: int
    prefix_cache: bool = False
    slot_tokens: int = 0
    exact: bool = False

    @classmethod
    def of(cls, config: Any) -> Limits:
        """Returns those of an `OffloadConfig`."""
        return cls(
            int(config.max_num_seqs),
            int(config.prefill_chunk_size),
            config.prefix_cache,
            int(config.slot_tokens),
            config.numerics == "exact",
        )
