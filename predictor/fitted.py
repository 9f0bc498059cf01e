"""Baselines that are fitted to training rows, and stored beside a predictor (a few MB)."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save as safetensors_bytes

from layerscope_jax.prediction.traces import Trace
from layerscope_jax.support.files import parse_json, write_file
from layerscope_jax.support.locks import locked
from predictor.baselines import Popularity
from predictor.dataset import for_training, load_rows
from predictor.linear import LinearParams, first_linear, fit
from predictor.pca import Basis
from predictor.routers import Routers
from predictor.settings import checksums

FILE = "baselines.safetensors"
LEARNED = ("weight", "bias", "gain")


@dataclass(frozen=True)
class Fitted:
    """Popularity and the linear map.

    Attributes:
        share: [L, E] share of the training rows that choose each expert.
        linear: the linear map.
        made: model, PCA, horizons and number of rows that it was fitted for.
    """

    share: np.ndarray
    linear: LinearParams
    made: dict[str, Any]

    def save(self, folder: Path) -> None:
        """Writes the file: the map in float16, without the parts that a trace also holds."""
        arrays = {name: getattr(self.linear, name).astype(np.float16) for name in LEARNED}
        arrays["share"] = self.share
        metadata = {"made": json.dumps(self.made), "checksums": json.dumps(checksums(arrays))}
        write_file(folder / FILE, safetensors_bytes(arrays, metadata))


def load_or_fit(
    folder: Path, trace: Trace, horizons: tuple[int, ...], tokens: int, *, progress: bool = True
) -> Fitted:
    """Reads the fitted baselines of `folder`, or fits them to the trace's training rows and saves them there.

    Args:
        folder: folder of a predictor.
        trace: the trace, with its PCA and routers.
        horizons: layers ahead that are forecast.
        tokens: maximum number of training rows.
        progress: whether to show a progress bar.

    Raises:
        ValueError: if there is neither such a file nor a training row, or another run is fitting them.
    """
    basis, routers, model = Basis.load(trace.folder), Routers.load(trace.folder), trace.header.model
    made = {"model": model.to_json(), "pca": digest(basis), "horizons": list(horizons)}
    there = sum(passage.tokens for _, passage, _ in trace.passages() if for_training(passage))
    kept = _read(folder / FILE)
    if kept is not None:
        arrays, before = kept
        differing = [name for name, ours in made.items() if before.get(name) != ours]
        # Passages are not split, so fewer rows than requested may fit.
        fewer = 1.01 * before.get("rows", 0) < min(tokens, there)
        if not differing and not fewer:
            if arrays["share"].shape != (model.num_layers, model.num_experts):
                raise ValueError(f"{folder / FILE}: share has shape {arrays['share'].shape}; delete it")
            linear = first_linear(model, basis, routers, horizons, arrays["share"])
            learned: dict[str, Any] = {name: arrays[name].astype(np.float32) for name in LEARNED}
            wrong = [name for name in LEARNED if learned[name].shape != getattr(linear, name).shape]
            if wrong:
                raise ValueError(f"{folder / FILE}: {', '.join(wrong)} of other shapes; delete it")
            return Fitted(arrays["share"], replace(linear, **learned), before)
    else:
        differing = []
    if not there:
        why = f"is of another {', '.join(differing)}" if differing else "is not there"
        raise ValueError(
            f"popularity and the linear map need training rows, but {trace.folder} has none and "
            f"{folder / FILE} {why}; score with the trace that the predictor was trained on"
        )
    with locked(folder / FILE):
        rows = load_rows(trace, for_training, most=tokens, what="passages to fit the baselines to")
        share = Popularity.count(rows.experts, model.num_experts)
        first = first_linear(model, basis, routers, horizons, share)
        fitted = Fitted(share, fit(first, rows, horizons, progress=progress), made | {"rows": len(rows)})
        fitted.save(folder)
    return fitted


def digest(basis: Basis) -> str:
    """Returns the digest of a PCA."""
    digested = hashlib.blake2b(digest_size=8)
    for array in (basis.mean, basis.components):
        digested.update(np.ascontiguousarray(array).tobytes())
    return digested.hexdigest()


def _read(file: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """Returns the arrays and `Fitted.made`; None if there is no such file.

    Raises:
        ValueError: if it is damaged.
    """
    if not file.exists():
        return None
    try:
        with safe_open(file, "numpy") as opened:
            arrays = {name: opened.get_tensor(name) for name in (*LEARNED, "share")}
            metadata = opened.metadata() or {}
        made = parse_json(metadata["made"].encode())
        if not isinstance(made, dict) or type(made.get("rows")) is not int:
            raise TypeError(f"{str(made)[:80]}")
        sums = checksums(arrays)
        kept = parse_json(metadata["checksums"].encode()) if "checksums" in metadata else sums
        if kept != sums or not all(np.isfinite(array).all() for array in arrays.values()):
            raise ValueError("arrays that are damaged")
        return arrays, made
    except Exception as error:  # safetensors raises nothing narrower
        raise ValueError(f"{file}: expected fitted baselines, got {error!r}; delete it") from None
