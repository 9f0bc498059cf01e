"""Sampling settings that a checkpoint recommends, from its `generation_config.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerscope_jax.support.checks import Problems
from layerscope_jax.support.files import is_there, read_json
from layerscope_jax.support.units import is_integer

WHOLE = {"max_new_tokens": 1, "min_new_tokens": 0, "top_k": -1}
"""Whole numbers, and the least that each may be."""

NUMBERS = {
    "temperature": (0, 1e6, "a number from 0 (greedy) to 1e6"),
    "top_p": (math.ulp(0), 1, "a number in (0, 1]"),
    "min_p": (0, 1, "a number in [0, 1]"),
    "repetition_penalty": (math.ulp(0), 1e6, "a number over 0, up to 1e6"),
}
"""Other numbers: the least and the most that each may be, and both in words."""

SAMPLING = ("temperature", "top_k", "top_p", "min_p")
"""Settings that transformers obeys only if `do_sample` is true."""


def read_generation_defaults(folder: Path) -> dict[str, int | float]:
    """Returns the settings that a checkpoint's folder recommends; none where it has no such file.

    Raises:
        ValueError: as `generation_defaults`, with the name of the file.
    """
    file = folder / "generation_config.json"
    if not is_there(file):
        return {}
    try:
        return generation_defaults(read_json(file))
    except ValueError as error:
        raise ValueError(str(error) if str(file) in str(error) else f"{file}: {error}") from None


def generation_defaults(generation: Mapping[str, Any]) -> dict[str, int | float]:
    """Returns the settings of requests that a `generation_config.json` recommends, by the names of `Request`.

    As for transformers, the likeliest token is taken unless `do_sample` is true. What the file leaves out, or
    sets to null, is left out; keys that are no setting of a request are passed over.

    Args:
        generation: contents of the file.

    Raises:
        ValueError: naming each setting that is out of range.

    >>> generation_defaults({"do_sample": True, "temperature": 0.7, "top_p": 0.8, "pad_token_id": 3})
    {'temperature': 0.7, 'top_p': 0.8}
    >>> generation_defaults({"do_sample": False, "temperature": 0.7})
    {'temperature': 0.0}
    """
    given = {name: value for name, value in generation.items() if value is not None}
    problems = Problems()
    sample = given.get("do_sample", False)
    problems.expect(isinstance(sample, bool), "do_sample", "true or false", sample)
    defaults: dict[str, int | float] = {}
    for name, least in WHOLE.items():
        if name in given:
            fits = is_integer(given[name]) and least <= given[name] < 2**31
            problems.expect(fits, name, f"a whole number in {least}..2**31-1", given[name])
            defaults[name] = given[name]
    for name, (low, high, expected) in NUMBERS.items():
        if name in given:
            fits = type(given[name]) in (int, float) and low <= given[name] <= high
            problems.expect(fits, name, expected, given[name])
            defaults[name] = given[name]
    problems.raise_any(remedy="correct it, or remove it from the file")
    if sample:
        defaults.setdefault("temperature", 1.0)
    else:
        defaults = {name: value for name, value in defaults.items() if name not in SAMPLING}
        if "do_sample" in given:
            defaults["temperature"] = 0.0
    return defaults
