"""Rows for training and scoring, split by document and not by row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from layerscope_jax.prediction.traces import Passage, Trace, passage_of_row
from predictor.documents import stable_hash


@dataclass(frozen=True)
class Rows:
    """Tokens of some passages, one after another.

    Attributes:
        passages: passages of the tokens, in the order of the rows.
        hidden: [N, L, P] float16 reduced hidden states.
        experts: [N, L, K] chosen experts.
        weights: [N, L, K] float16 router weights.
        following: [N] row of the next token of the same passage, -1 for its last token.
    """

    passages: tuple[Passage, ...]
    hidden: np.ndarray
    experts: np.ndarray
    weights: np.ndarray
    following: np.ndarray

    def __len__(self) -> int:
        return len(self.following)

    def before(self) -> np.ndarray:
        """Row [N] of the previous token of the same passage, -1 for its first token."""
        rows = np.full(len(self), -1)
        has_next = np.flatnonzero(self.following >= 0)
        rows[self.following[has_next]] = has_next
        return rows

    def passage_of_row(self) -> np.ndarray:
        """[N] index into `passages`."""
        return passage_of_row(self.passages)


def load_rows(
    trace: Trace, keep: Callable[[Passage], bool], *, most: int | None = None, what: str = "passages"
) -> Rows:
    """Reads the passages for which `keep` holds, in the order of the recording, and checks checksums.

    Args:
        trace: trace with hidden states.
        keep: whether a passage is read.
        most: maximum number of rows; None for all.
        what: name of these passages in an error message.

    Raises:
        ValueError: if there are none, a file is damaged, or a hidden state is not finite.
    """
    if not trace.header.hidden:
        raise ValueError(
            f"{trace.folder}: expected hidden states, but the trace was recorded without them; record it anew"
        )
    passages: list[Passage] = []
    parts: dict[str, list[np.ndarray]] = {"hidden": [], "experts": [], "weights": []}
    rows = 0
    for chunk in trace.chunks:
        end, mapped = 0, None
        for passage in chunk.passages:
            start, end = end, end + passage.tokens
            if not keep(passage) or (most is not None and rows + passage.tokens > most):
                continue
            if mapped is None:
                chunk.verify()
                mapped = {name: chunk.map(name) for name in parts}
            for name, array in mapped.items():
                parts[name].append(np.asarray(array[start:end]))
            passages.append(passage)
            rows += passage.tokens
    if not passages:
        raise ValueError(
            f"{trace.folder}: expected {what}, got none among {trace.rows:,} rows; record more text"
        )
    arrays = {name: np.concatenate(pieces) for name, pieces in parts.items()}
    finite = np.isfinite(arrays["hidden"]).all((0, 2))
    if not finite.all():
        raise ValueError(
            f"{trace.folder}: hidden states of layers {np.flatnonzero(~finite).tolist()} are not finite; "
            "record it anew"
        )
    following = np.arange(1, rows + 1)
    following[np.cumsum([passage.tokens for passage in passages]) - 1] = -1
    return Rows(tuple(passages), following=following, **arrays)


def for_training(passage: Passage) -> bool:
    """Whether a passage is in the training set: four in five of the training documents, by a hash."""
    return passage.split == "train" and stable_hash(f"fit/{passage.domain}/{passage.document}") < 0.8


def for_validation(passage: Passage) -> bool:
    """Whether a passage is in the validation set, the other fifth, which decides when training stops."""
    return passage.split == "train" and not for_training(passage)


def expert_weights(experts: np.ndarray, num_experts: int) -> np.ndarray:
    """Returns class weights [L, E]: inverse to how often an expert is chosen, one at an even share.

    They are clipped to 1/4..4, so that a rarely chosen expert does not outweigh all others.

    Args:
        experts: [N, L, K] experts of the training rows.

    >>> expert_weights(np.array([[[0, 1]], [[0, 2]]]), 4).tolist()
    [[0.5, 1.0, 1.0, 4.0]]
    """
    rows, layers, choices = experts.shape
    counts = np.stack(
        [np.bincount(experts[:, layer].ravel(), minlength=num_experts) for layer in range(layers)]
    )
    even = rows * choices / num_experts
    return np.clip(even / np.maximum(counts, 1e-9), 0.25, 4.0).astype(np.float32)
