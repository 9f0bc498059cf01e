"""Batches of held-out rows that could run together, and sums over the rows of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from layerscope_jax.prediction.traces import decode_rows
from layerscope_jax.scheduling.plan import Phase
from predictor.dataset import Rows
from predictor.metrics import batch_sum

MOST = 512  # batches of a size in a group


class Group(NamedTuple):
    """Rows that are scored together."""

    domain: str
    phase: Phase


class Batches(NamedTuple):
    """Batches of one phase and size.

    Attributes:
        members: [G, B] rows for decode steps, prompts for prefill.
        group: [G] index of the group.
    """

    members: np.ndarray
    group: np.ndarray


@dataclass(frozen=True)
class Batching:
    """Held-out rows by domain and phase, and batches of them.

    A batch holds different passages of one domain: their tokens at one decode step, or their whole prompts. A
    domain with fewer passages than the batch size has no batch of that size.

    Attributes:
        rows: the held-out rows.
        sizes: batch sizes B.
        seed: seed of the passages' order.
    """

    rows: Rows
    sizes: tuple[int, ...]
    seed: int

    @cached_property
    def _starts(self) -> np.ndarray:
        """First row of each passage."""
        return np.cumsum([0, *(passage.tokens for passage in self.rows.passages)])[:-1]

    @cached_property
    def _decode(self) -> np.ndarray:
        """[N] bool: whether a row is a decode step."""
        return decode_rows(self.rows.passages)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Groups that have rows, by domain."""
        domains = sorted({passage.domain for passage in self.rows.passages})
        phases: tuple[Phase, ...] = ("decode", "prefill")
        groups = (Group(domain, phase) for domain in domains for phase in phases)
        return tuple(group for group in groups if self.passages(group))

    @cached_property
    def member(self) -> np.ndarray:
        """[groups, N] float32 ones where a row belongs to the group."""
        domains = np.array([passage.domain for passage in self.rows.passages])[self.rows.passage_of_row()]
        return np.stack(
            [(domains == group.domain) & (self._decode == (group.phase == "decode")) for group in self.groups]
        ).astype(np.float32)

    def passages(self, group: Group) -> int:
        """Number of the group's passages."""
        return sum(
            passage.domain == group.domain and (group.phase == "prefill" or passage.prompt < passage.tokens)
            for passage in self.rows.passages
        )

    def has(self, group: int, size: int) -> bool:
        """Whether the group, given by its index, has a batch of that size."""
        formed = self.formed.get((self.groups[group].phase, size))
        return formed is not None and bool((formed.group == group).any())

    @cached_property
    def prompts(self) -> np.ndarray:
        """Rows [passages, M] of each passage's prompt, padded with -1."""
        lengths = np.array([passage.prompt for passage in self.rows.passages])
        within = np.arange(lengths.max())[None]
        return np.where(within < lengths[:, None], self._starts[:, None] + within, -1)

    @cached_property
    def formed(self) -> dict[tuple[Phase, int], Batches]:
        """All batches by phase and size, at most `MOST` for each group and size; only pairs with batches."""
        formed: dict[tuple[Phase, int], tuple[list, list]] = {}
        for index, group in enumerate(self.groups):
            order = np.random.default_rng((self.seed, index)).permutation(
                [at for at, passage in enumerate(self.rows.passages) if passage.domain == group.domain]
            )
            for size in self.sizes:
                together = self._together(group.phase, order)
                members = np.array([batch for units in together for batch in cut(units, size)])
                if len(members):
                    if len(members) > MOST:
                        members = members[np.linspace(0, len(members) - 1, MOST).astype(int)]
                    parts = formed.setdefault((group.phase, size), ([], []))
                    parts[0].append(members)
                    parts[1].append(np.full(len(members), index))
        return {key: Batches(*map(np.concatenate, parts)) for key, parts in formed.items()}

    def _together(self, phase: Phase, order: np.ndarray) -> Iterator[np.ndarray]:
        """Yields prompts, or rows of a step, that may share a batch, for a domain's passages in `order`."""
        if phase == "prefill":
            yield order
            return
        prompts, tokens = (
            np.array([getattr(self.rows.passages[at], name) for at in order]) for name in ("prompt", "tokens")
        )
        for step in range(int((tokens - prompts).max())):
            there = step < tokens - prompts
            yield self._starts[order[there]] + prompts[there] + step

    def sums(self, phase: Phase, *values: jax.Array) -> list[dict[int, np.ndarray]]:
        """Returns the sums of values [N, E] over the batches of a phase: size -> [G, E]."""
        units = jnp.asarray(self.prompts) if phase == "prefill" else None
        return jax.device_get(_sums(values, units, self._members[phase]))

    @cached_property
    def _members(self) -> dict[Phase, dict[int, jax.Array]]:
        """Phase -> size -> [G, B] members of each batch, on the device."""
        members: dict[Phase, dict[int, jax.Array]] = {"decode": {}, "prefill": {}}
        for (phase, size), batches in self.formed.items():
            members[phase][size] = jnp.asarray(batches.members)
        return members


@jax.jit
def _sums(
    values: tuple[jax.Array, ...], units: jax.Array | None, members: dict[int, jax.Array]
) -> list[dict[int, jax.Array]]:
    """Returns sums over batches in one call, because a scorecard needs thousands of them."""
    if units is not None:
        values = tuple(batch_sum(value, units) for value in values)
    return [{size: batch_sum(value, rows) for size, rows in members.items()} for value in values]


def cut(items: np.ndarray, size: int) -> Sequence[np.ndarray]:
    """Returns complete pieces of a size; the rest is left out.

    >>> [piece.tolist() for piece in cut(np.arange(5), 2)]
    [[0, 1], [2, 3]]
    """
    return [items[start : start + size] for start in range(0, len(items) - size + 1, size)]
