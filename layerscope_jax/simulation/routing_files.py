"""Files of recorded routing (`simulation.routing`): what is in them, and whether it fits together.

An .npz file holds, for R requests, S decode steps, L layers, E experts, K choices, W layers of look-ahead and
the M likeliest experts of each forecast:

    header                           JSON: format, geometry, the requests' domains, where it all came from
    decode_experts                   [S, R, L, K] uint8
    prefill_experts                  [R, P, L, K] uint8, of the prompts that the decode steps follow
    prefill_lengths                  [R] integers, tokens of each prompt, 1..P; past them is nothing
    forecast.NAME.experts            [S, R, L, W, M] uint8
    forecast.NAME.probabilities      [S, R, L, W, M] uint8, in 255ths; experts that are left out count zero
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from layerscope_jax.support.files import parse_json, replace_files
from layerscope_jax.support.json_fields import is_file

FORMAT = 1
MOST_EXPERTS = 256  # that a byte can name

_PARTS = ("experts", "probabilities")
_FIXED = ("decode_experts", "prefill_experts", "prefill_lengths")


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A file's header and arrays; `problems` says whether they fit together.

    Raises:
        ValueError: if it is none, or arrays are missing or not known, all of them named.
    """
    if not is_file(path):
        raise ValueError(
            f"{str(path)[:200]}: expected a file of recorded routing, found none; "
            "tools/record_routing.py makes one"
        )
    try:
        # Opened here, for np.load forgets to close what is broken.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as opened:
            arrays = {name: opened[name] for name in opened.files}
    except Exception as error:  # of numpy, zipfile and zlib: nothing narrower has them all
        raise ValueError(f"{path}: expected an .npz file, got {error!r}; copy it again") from None
    wanted = {"header", *_FIXED}
    wanted |= {f"{name.rsplit('.', 1)[0]}.{part}" for name in arrays if _of_forecast(name) for part in _PARTS}
    found = [f"{name} is missing" for name in sorted(wanted - arrays.keys())]
    found += [f"{name} is not expected" for name in sorted(arrays.keys() - wanted)]
    if found:
        raise ValueError(f"{path}: {'; '.join(found)}; copy it again")
    try:
        header = parse_json(str(arrays.pop("header")).encode())
    except ValueError as error:
        raise ValueError(f"{path}: header: expected JSON, got {error}; copy it again") from None
    return header, arrays


def write(path: Path, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a file, whole or not at all.

    Raises:
        ValueError: if it cannot be written.
    """

    named: dict[str, Any] = {"header": np.array(json.dumps(header)), **arrays}

    def save(temporary: Path) -> None:
        with temporary.open("wb") as file:  # a file, for np.savez adds .npz to a name
            np.savez_compressed(file, **named)

    replace_files(path.parent, {path.name: save})


def problems(header: Any, arrays: Mapping[str, np.ndarray]) -> list[str]:
    """Everything that does not fit together; `arrays` has all that a file must have, by their names there."""
    try:
        version = header["format"]
        geometry = [header["geometry"][name] for name in ("layers", "experts", "choices")]
        domains = header["domains"]
        if not isinstance(domains, list | tuple) or not all(isinstance(name, str) for name in domains):
            raise TypeError(f"domains {str(domains)[:40]}")
        if not all(type(number) is int for number in geometry):
            raise TypeError(f"geometry {str(geometry)[:80]}")
        layers, experts, choices = geometry
    except (KeyError, TypeError, ValueError, IndexError) as error:
        return [f"header: expected format, geometry (layers, experts, choices) and domains, got {error!r}"]
    others = [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]
    if others:
        return [f"{name}: expected an array, got {type(arrays[name]).__name__}" for name in sorted(others)]
    if version != FORMAT:
        return [f"header: expected format {FORMAT}, got {str(version)[:40]}"]
    if not (1 <= choices <= experts <= MOST_EXPERTS and layers >= 1):
        return [
            f"header: expected layers of 1 or more and 1 <= choices <= experts <= {MOST_EXPERTS}, got "
            f"{layers} layers, {choices} choices, {experts} experts"
        ]
    requests = len(domains)
    if not requests:
        return ["header: expected the domain of each request, got none"]
    steps = arrays["decode_experts"].shape[0] if arrays["decode_experts"].ndim else 0
    prompt = arrays["prefill_experts"].shape[1] if arrays["prefill_experts"].ndim > 1 else 0
    # None may be anything but 0.
    shapes: dict[str, tuple[int | None, ...]] = {
        "decode_experts": (None, requests, layers, choices),
        "prefill_experts": (requests, None, layers, choices),
        "prefill_lengths": (requests,),
    }
    for name in arrays.keys() - shapes.keys():
        ahead = arrays[name].shape[3] if arrays[name].ndim == 5 else 0
        partner = arrays[f"{name.rsplit('.', 1)[0]}.experts"]
        kept = partner.shape[4] if partner.ndim == 5 else 0
        shapes[name] = (steps, requests, layers, min(max(ahead, 1), layers), min(max(kept, 1), experts))
    found = [
        f"{name}: expected shape {_shown(shape)}, got {arrays[name].shape}"
        for name, shape in sorted(shapes.items())
        if not _fits(arrays[name].shape, shape)
    ]
    for name, array in sorted(arrays.items()):
        integers = name == "prefill_lengths"
        if not (np.issubdtype(array.dtype, np.integer) if integers else array.dtype == np.uint8):
            found.append(f"{name}: expected {'integers' if integers else 'uint8'}, got {array.dtype}")
    if found:
        return found
    lengths = arrays["prefill_lengths"]
    if lengths.min() < 1 or lengths.max() > prompt:
        found.append(f"prefill_lengths: expected 1..{prompt}, got {lengths.min()}..{lengths.max()}")
        return found
    real = np.arange(prompt)[None] < lengths[:, None]
    for name, array in sorted(arrays.items()):
        if name.endswith("experts"):
            found += _not_experts(name, array[real] if name == "prefill_experts" else array, experts)
    return found


def _not_experts(name: str, chosen: np.ndarray, experts: int) -> list[str]:
    """What is wrong with sets of experts [..., n]."""
    if chosen.max() >= experts:
        return [f"{name}: expected experts 0..{experts - 1}, got {chosen.max()}"]
    ordered = np.sort(chosen, -1)
    twice = (ordered[..., 1:] == ordered[..., :-1]).any(-1).sum()
    return [f"{name}: expected different experts for a token, got {twice:,} with one twice"] if twice else []


def _of_forecast(name: str) -> bool:
    return name.startswith("forecast.") and name.count(".") == 2 and name.endswith(_PARTS)


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(
        size > 0 if want is None else size == want for size, want in zip(shape, wanted, strict=True)
    )


def _shown(shape: tuple[int | None, ...]) -> str:
    return f"({', '.join('any' if size is None else str(size) for size in shape)})"
