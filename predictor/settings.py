"""Settings of a predictor, as `predictor.json` in its folder holds them, read field by field."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from layerscope_jax.checkpoints.identity import ModelIdentity
from layerscope_jax.support.checks import Problems
from predictor.network import GroupConfig, group_layers

FORMAT = 3
GROUPS = ("input", "middle", "output")
MOST_AHEAD, MOST_BLOCKS, MOST_WIDE = 256, 256, 2**20
"""Upper limits, far beyond any use: larger numbers are damage, and would take all memory."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Content of `predictor.json`.

    Attributes:
        model: identity of the model whose experts are predicted.
        look_ahead: W.
        groups: networks by group.
        checksums: CRC-32 of each stored array; None in old folders.
    """

    model: ModelIdentity
    look_ahead: int
    groups: Mapping[str, GroupConfig]
    checksums: Mapping[str, int] | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "model": self.model.to_json(),
            "look_ahead": self.look_ahead,
            "groups": {name: asdict(group) for name, group in self.groups.items()},
            "checksums": self.checksums,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any], where: Path) -> Settings:
        """Reads a record that `to_json` made.

        Args:
            record: a JSON object.
            where: its file, for messages.

        Raises:
            ValueError: naming every field that is invalid.
        """
        if record.get("format") != FORMAT:
            raise ValueError(
                f"{where}: expected format {FORMAT}, got {str(record.get('format'))[:40]}; train it again: "
                "networks of other formats have other shapes"
            )
        problems = Problems()
        model = problems.check(ModelIdentity.from_json, record.get("model"))
        look_ahead: Any = record.get("look_ahead")
        sums = record.get("checksums")
        fits = _whole(look_ahead, 1, MOST_AHEAD)
        problems.expect(fits, "look_ahead", f"a whole number in 1..{MOST_AHEAD}", look_ahead)
        described: Any = record.get("groups")
        described = described if isinstance(described, dict) else {}
        needed = (
            [] if model is None else [n for n, layers in group_layers(model.num_layers).items() if layers]
        )
        for name in described.keys() - set(GROUPS):
            problems.add(f"groups.{_shown(name)} is not one of {', '.join(GROUPS)}")
        problems.add(*(f"groups.{name} is missing" for name in needed if name not in described))
        groups = {
            name: problems.check(_group, described[name], f"groups.{name}")
            for name in GROUPS
            if name in described
        }
        by_array = isinstance(sums, dict) and all(_whole(value, 0, 2**32 - 1) for value in sums.values())
        problems.expect(sums is None or by_array, "checksums", "a CRC-32 by array", sums)
        problems.raise_any(f"{where}: expected a predictor's settings", "copy it again, or train anew")
        return cls(model=model, look_ahead=look_ahead, groups=groups, checksums=sums)


def checksums(arrays: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Returns the CRC-32 of each array's bytes.

    >>> checksums({"bias": np.array([1, 2], np.int8)})
    {'bias': 3066839698}
    """
    return {name: zlib.crc32(np.ascontiguousarray(arrays[name]).tobytes()) for name in sorted(arrays)}


def _group(settings: Any, where: str) -> GroupConfig:
    """Returns the settings of a network.

    Raises:
        ValueError: naming every setting that is invalid.
    """
    if not isinstance(settings, dict):
        raise ValueError(f"{where} must be an object, got {_shown(settings)}")
    rules: dict[str, tuple[str, Any]] = {
        "components": (f"a whole number in 1..{MOST_WIDE}", lambda value: _whole(value, 1, MOST_WIDE)),
        "width": (f"a whole number in 1..{MOST_WIDE}", lambda value: _whole(value, 1, MOST_WIDE)),
        "blocks": (f"a whole number in 0..{MOST_BLOCKS}", lambda value: _whole(value, 0, MOST_BLOCKS)),
        "gated": ("true or false", lambda value: type(value) is bool),
        "dropout": ("a number in 0..1, less than 1", lambda value: _number(value) and 0 <= value < 1),
        "noise": ("a number of 0 or more", lambda value: _number(value) and value >= 0),
        "learning_rate": ("a number over 0", lambda value: _number(value) and value > 0),
        "weight_decay": ("a number of 0 or more", lambda value: _number(value) and value >= 0),
    }
    assert rules.keys() == {field.name for field in fields(GroupConfig)}
    problems = Problems()
    problems.same_names(
        (f"{where}.{str(name)[:40]}" for name in settings), (f"{where}.{name}" for name in rules)
    )
    for name in rules.keys() & settings.keys():
        expected, fits = rules[name]
        problems.expect(fits(settings[name]), f"{where}.{name}", expected, settings[name])
    problems.raise_any()
    return GroupConfig(**settings)


def _whole(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _shown(value: Any) -> str:
    return repr(value)[:60]
