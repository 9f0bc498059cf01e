"""Computes the figures of a scorecard, as plain JSON records, from sums over rows and batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from predictor import metrics
from predictor.batches import Batching


@dataclass
class Sums:
    """Sums of one predictor's scores, by layer, horizon and group of rows.

    Attributes:
        rows: [L, H, G, 3] exact recall, relaxed recall, rows.
        bins: [L, H, G, 10, 3] sums of `metrics.reliability`.
        batches: size -> [L, H, G, 7] sums of `metrics.BatchScores` and `metrics.batch_recall`, and the
            number of batches.
        curves: size -> [L, H, G, 2, E] sums of `metrics.prefetch`.
    """

    rows: np.ndarray
    bins: np.ndarray
    batches: dict[int, np.ndarray] = field(default_factory=dict)
    curves: dict[int, np.ndarray] = field(default_factory=dict)

    @classmethod
    def zeros(cls, layers: int, horizons: int, groups: int) -> Sums:
        shape = (layers, horizons, groups)
        return cls(np.zeros((*shape, 3)), np.zeros((*shape, metrics.BINS, 3)))

    def add(self, at: tuple[int, int], size: int, sums: metrics.BatchSums, group: np.ndarray) -> None:
        """Adds batches of one layer and horizon; batches without a known target do not count.

        Args:
            at: layer and place of the horizon.
            size: B.
            sums: of the batches.
            group: [batches] group of each batch.
        """
        there = sums.counts.sum(-1) > 0
        sums, group = metrics.BatchSums(*(part[there] for part in sums)), group[there]
        shape = self.rows.shape[:3]
        experts = sums.counts.shape[-1]
        scores = self.batches.setdefault(size, np.zeros((*shape, 7)))
        curves = self.curves.setdefault(size, np.zeros((*shape, 2, experts)))
        curve = metrics.prefetch(sums)
        recall = metrics.batch_recall(curve[1], sums.counts)
        each = np.stack([*metrics.batch_scores(sums), recall, np.ones(len(group))], 1)
        np.add.at(scores[at], group, each)
        np.add.at(curves[at], group, np.stack(curve, 1))


def report(
    sums: Mapping[str, Sums],
    batching: Batching,
    horizons: Sequence[int],
    unseen: Sequence[str],
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns all figures; those of a horizon are means over the layers whose target is in the same step.

    Args:
        sums: predictor -> its sums.
        batching: groups and batches of the sums.
        horizons: layers ahead, in the order of the sums.
        unseen: domains that were not trained on.
        about: entries to put in front.

    Returns:
        rows: for each predictor, domain, phase, horizon and batch size its figures. Recall is of all rows,
            whatever the batch, `batch_recall` of its set of experts. `wraps` marks those of the layers whose
            target is in the next token's step.
            What cannot be said (the precision where nothing is foreseen) is None.
        layers: recall by layer, wrapping ones in place.
        calibration: bins, and their error.
        waste: for m = 1..E, the share of the m fetched experts that no token takes and of the tokens' choices
            that they cover.
        left_out: batch sizes that a domain has too few passages for.
    """
    result: dict[str, Any] = dict(about) | {"horizons": list(horizons), "unseen": list(unseen)}
    result |= {name: [] for name in ("rows", "layers", "calibration", "waste")}
    result["left_out"] = [
        {"domain": group.domain, "phase": group.phase, "batch": size, "passages": batching.passages(group)}
        for index, group in enumerate(batching.groups)
        for size in batching.sizes
        if not batching.has(index, size)
    ]
    for name, total in sums.items():
        for place, horizon in enumerate(horizons):
            for index, group in enumerate(batching.groups):
                head = {"predictor": name, "domain": group.domain, "unseen": group.domain in unseen}
                head |= {"phase": group.phase, "horizon": horizon}
                at = np.s_[:, place, index]
                for wraps, layers in parts(len(total.rows), horizon):
                    result["rows"] += [head | {"wraps": wraps} | row for row in _rows(total, at, layers)]
                exact, rows = total.rows[at][:, 0], total.rows[at][:, 2]
                result["layers"].append(head | {"recall": _listed(_share(exact, rows))})
                inside = parts(len(total.rows), horizon)[0][1]
                bins = total.bins[at][inside].sum(0)
                result["calibration"].append(head | _calibration(bins))
                for size, curves in total.curves.items():
                    counts = total.batches[size][at][inside, -1]
                    if counts.any():
                        wasted, covered = _mean(curves[at][inside] / np.maximum(counts, 1)[:, None, None])
                        curve = {"wasted": _listed(wasted), "covered": _listed(covered)}
                        result["waste"].append(head | {"batch": size} | curve)
    return result


def parts(layers: int, horizon: int) -> list[tuple[bool, slice]]:
    """Returns the layers with a target in the same step, and those with one in the next step (`wraps`)."""
    return [(False, slice(0, layers - horizon)), (True, slice(layers - horizon, layers))]


def _rows(total: Sums, at: Any, layers: slice) -> Iterator[dict[str, Any]]:
    rows = total.rows[at][layers]  # [layers, 3]
    if not rows[:, -1].any():
        return
    exact, relaxed = _mean(_share(rows[:, :2], rows[:, 2:]))
    recall = {"recall": _number(exact), "relaxed_recall": _number(relaxed), "rows": int(rows[:, -1].max())}
    for size, scores in total.batches.items():
        foreseen, present, both, error, tokens, covered, batches = scores[at][layers].T
        if batches.any():
            yield {
                "batch": size,
                "batches": int(batches.max()),
                **recall,
                "batch_recall": _number(_mean(_share(covered, batches))),
                "presence_precision": _number(_mean(_share(both, foreseen))),
                "presence_recall": _number(_mean(_share(both, present))),
                "count_error": _number(_mean(_share(error, batches))),
                "count_error_relative": _number(_mean(_share(error, tokens))),
            }


def _calibration(bins: np.ndarray) -> dict[str, Any]:
    count, expected, true = bins.T
    return {
        "error": _number(metrics.calibration_error(bins)),
        "bins": [
            {"probability": _number(p), "observed": _number(o), "count": int(n)}
            for p, o, n in zip(_share(expected, count), _share(true, count), count, strict=True)
        ],
    }


def _share(of: np.ndarray, to: np.ndarray) -> np.ndarray:
    """Returns `of / to`; NaN where it is not defined."""
    return np.divide(of, to, out=np.full(np.broadcast_shapes(of.shape, to.shape), np.nan), where=to > 0)


def _mean(values: np.ndarray) -> np.ndarray:
    """Returns the mean over the first axis without NaN; NaN if there is nothing else."""
    known = np.isfinite(values)
    return _share(np.where(known, values, 0.0).sum(0), known.sum(0))


def _number(value: Any) -> float | None:
    """Returns a number rounded for JSON; None for NaN, which JSON lacks."""
    return round(float(value), 5) if np.isfinite(value) else None


def _listed(values: np.ndarray) -> list[float | None]:
    return [_number(value) for value in values]
