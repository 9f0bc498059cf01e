"""Packed tokens on disk -> batches, each a function of (seed, step): a resumed run sees the same ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class PackedTokens:
    """Token arrays of several domains, mapped from `DIR/<domain>.npy`.

    Attributes:
        domains: name -> uint16 [N] documents one after another, each ended by the end-of-text token.
    """

    domains: dict[str, np.ndarray]

    @classmethod
    def open(cls, folder: Path, *, without: Sequence[str] = ()) -> PackedTokens:
        """Maps every domain of a split's folder, but for some.

        Raises:
            ValueError: if the folder holds no other domain, or lacks one of `without`.
        """
        files = sorted(path for path in folder.glob("*.npy") if not path.name.endswith(".offsets.npy"))
        domains = {path.stem: np.load(path, mmap_mode="r") for path in files}
        domains = {name: tokens for name, tokens in domains.items() if len(tokens)}
        if not domains:
            raise ValueError(
                f"expected token arrays (*.npy) in {folder}, found none; "
                "make them with `python -m tools.shipped_model.tokenizer`"
            )
        left = {name: tokens for name, tokens in domains.items() if name not in without}
        if not left or not domains.keys() >= {*without}:
            raise ValueError(
                f"expected `without` to name some of the domains in {folder} ({', '.join(domains)}), and not "
                f"all, got {', '.join(without)}"
            )
        return cls(left)

    def batch(self, rows: int, length: int, *, seed: int, step: int) -> np.ndarray:
        """Random windows, domains in proportion to their sizes: [rows, length] int32."""
        random = np.random.default_rng((seed, step))
        names = [name for name, tokens in self.domains.items() if len(tokens) > length]
        sizes = np.array([len(self.domains[name]) for name in names], float)
        picked = random.choice(len(names), size=rows, p=sizes / sizes.sum())
        windows = []
        for index in picked:
            tokens = self.domains[names[index]]
            start = random.integers(len(tokens) - length)
            windows.append(tokens[start : start + length])
        return np.stack(windows).astype(np.int32)

    def windows(self, domain: str, length: int, limit: int | None = None) -> Iterator[np.ndarray]:
        """Consecutive windows [length] of one domain; `limit` of them, evenly spread, if given."""
        tokens = self.domains[domain]
        starts = np.arange(0, len(tokens) - length + 1, length)
        if limit is not None and len(starts) > limit:
            starts = starts[np.linspace(0, len(starts) - 1, limit).astype(int)]
        for start in starts:
            yield np.asarray(tokens[start : start + length], np.int32)
