"""Files of recorded routing (`simulation.routing`): their contents, and checks of their consistency.

An .npz file holds, for R requests, S decode steps, L layers, E experts, K choices, W layers of look-ahead and
the M likeliest experts of each forecast:

    header                           JSON: format, geometry (`RoutedExperts`), the requests' domains, origin
    decode_experts                   [S, R, L, K] uint8
    prefill_experts                  [R, P, L, K] uint8, of the prompts that the decode steps follow
    prefill_lengths                  [R] integers, tokens of each prompt, 1..P; past them is nothing
    forecast.NAME.experts            [S, R, L, W, M] uint8
    forecast.NAME.probabilities      [S, R, L, W, M] uint8, in 255ths; experts that are left out count zero
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from layerscope_jax.scheduling.geometry import RoutedExperts
from layerscope_jax.support.checks import Problems
from layerscope_jax.support.files import parse_json, write_file
from layerscope_jax.support.json_fields import is_file, of_record

FORMAT = 2
MOST_EXPERTS = 256  # that a byte can name

_PARTS = ("experts", "probabilities")
_FIXED = ("decode_experts", "prefill_experts", "prefill_lengths")


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns a file's header and arrays, which `check` has yet to check.

    Raises:
        ValueError: if it is not such a file, or naming all arrays that are missing or unknown.
    """
    if not is_file(path):
        raise ValueError(
            f"{str(path)[:200]}: expected a file of recorded routing, found none; "
            "`layerscope predictor routing` makes one of a model's trace"
        )
    try:
        # Opened explicitly, because np.load does not close damaged files.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as opened:
            arrays = {name: opened[name] for name in opened.files}
    except Exception as error:  # NumPy, zipfile and zlib raise errors without a common base
        raise ValueError(f"{path}: expected an .npz file, got {error!r}; copy it again") from None
    expected = {"header", *_FIXED}
    expected |= {
        f"{name.rsplit('.', 1)[0]}.{part}" for name in arrays if _of_forecast(name) for part in _PARTS
    }
    problems = Problems()
    problems.same_names(arrays, expected)
    problems.raise_any(str(path), "copy it again")
    try:
        header = parse_json(str(arrays.pop("header")).encode())
    except ValueError as error:
        raise ValueError(f"{path}: header: expected JSON, got {error}; copy it again") from None
    return header, arrays


def write(path: Path, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a file, completely or not at all.

    Raises:
        ValueError: if it cannot be written.
    """
    write_file(path, lambda file: _pack(file, {"header": np.array(json.dumps(header)), **arrays}))


def _pack(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays as `np.load` reads them, packed by LZMA: two thirds of `np.savez_compressed`'s bytes."""
    with zipfile.ZipFile(file, "w") as packed:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy")  # of a fixed date, so that equal arrays make equal files
            entry.compress_type = zipfile.ZIP_LZMA
            with packed.open(entry, "w") as opened:
                np.lib.format.write_array(opened, array, allow_pickle=False)


def check(header: Any, arrays: Mapping[str, np.ndarray]) -> RoutedExperts:
    """Returns the model's routed experts by the header, if header and arrays are consistent.

    Args:
        header: header of a file.
        arrays: all arrays of a file, by name.

    Raises:
        ValueError: naming everything that is inconsistent.
    """
    problems = Problems()
    others = [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]
    problems.add(
        *(f"{name}: expected an array, got {type(arrays[name]).__name__}" for name in sorted(others))
    )
    routed = problems.check(read_header, header, of="header")
    problems.raise_any()
    for name, shape in sorted(_shapes(routed, len(header["domains"]), arrays).items()):
        if not _fits(arrays[name].shape, shape):
            problems.add(f"{name}: expected shape {_shown(shape)}, got {arrays[name].shape}")
    for name, array in sorted(arrays.items()):
        integers = name == "prefill_lengths"
        if not (np.issubdtype(array.dtype, np.integer) if integers else array.dtype == np.uint8):
            problems.add(f"{name}: expected {'integers' if integers else 'uint8'}, got {array.dtype}")
    problems.raise_any()
    lengths, prompt = arrays["prefill_lengths"], arrays["prefill_experts"].shape[1]
    if lengths.min() < 1 or lengths.max() > prompt:
        raise ValueError(f"prefill_lengths: expected 1..{prompt}, got {lengths.min()}..{lengths.max()}")
    real = np.arange(prompt)[None] < lengths[:, None]
    for name, array in sorted(arrays.items()):
        if name.endswith("experts"):
            chosen = array[real] if name == "prefill_experts" else array
            problems.check(_check_experts, chosen, routed.num_experts, of=name)
    problems.raise_any()
    return routed


def read_header(header: Any) -> RoutedExperts:
    """Returns the model's routed experts by the header.

    Raises:
        ValueError: naming everything that is wrong with the header.
    """
    if not isinstance(header, Mapping):
        raise ValueError(f"expected format, geometry and domains, got {str(header)[:40]}")
    if header.get("format") != FORMAT:
        raise ValueError(
            f"expected format {FORMAT}, got {str(header.get('format'))[:40]}; record it anew (format 1 had "
            "other names for the model's sizes)"
        )
    problems = Problems()
    routed = problems.check(of_record, RoutedExperts, header.get("geometry"), "geometry")
    if routed is not None and routed.num_experts > MOST_EXPERTS:
        problems.add(f"geometry: expected at most {MOST_EXPERTS} experts a layer, got {routed.num_experts}")
    domains = header.get("domains")
    named = isinstance(domains, list | tuple) and all(isinstance(name, str) for name in domains)
    if not named or not domains:
        problems.add(f"domains: expected a list of the domain of each request, got {str(domains)[:40]}")
    problems.raise_any()
    return routed


def _shapes(
    routed: RoutedExperts, requests: int, arrays: Mapping[str, np.ndarray]
) -> dict[str, tuple[int | None, ...]]:
    """Returns the required shape of each array; None stands for any size but 0."""
    layers, choices = routed.num_layers, routed.experts_per_token
    steps = arrays["decode_experts"].shape[0] if arrays["decode_experts"].ndim else 0
    shapes: dict[str, tuple[int | None, ...]] = {
        "decode_experts": (None, requests, layers, choices),
        "prefill_experts": (requests, None, layers, choices),
        "prefill_lengths": (requests,),
    }
    for name in arrays.keys() - shapes.keys():
        ahead = arrays[name].shape[3] if arrays[name].ndim == 5 else 0
        partner = arrays[f"{name.rsplit('.', 1)[0]}.experts"]
        kept = partner.shape[4] if partner.ndim == 5 else 0
        shapes[name] = (
            steps,
            requests,
            layers,
            min(max(ahead, 1), layers),
            min(max(kept, 1), routed.num_experts),
        )
    return shapes


def _check_experts(chosen: np.ndarray, experts: int) -> None:
    """Refuses arrays that are not sets of experts [..., n].

    Raises:
        ValueError: if an expert does not exist, or is chosen twice.
    """
    if chosen.max() >= experts:
        raise ValueError(f"expected experts 0..{experts - 1}, got {chosen.max()}")
    ordered = np.sort(chosen, -1)
    twice = (ordered[..., 1:] == ordered[..., :-1]).any(-1).sum()
    if twice:
        raise ValueError(f"expected different experts for a token, got {twice:,} with one twice")


def _of_forecast(name: str) -> bool:
    return name.startswith("forecast.") and name.count(".") == 2 and name.endswith(_PARTS)


def _fits(shape: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    return len(shape) == len(expected) and all(
        size > 0 if want is None else size == want for size, want in zip(shape, expected, strict=True)
    )


def _shown(shape: tuple[int | None, ...]) -> str:
    return f"({', '.join('any' if size is None else str(size) for size in shape)})"
