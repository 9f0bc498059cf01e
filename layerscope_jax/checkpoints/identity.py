"""Which model something was made for: traces and predictors of another one are refused, with what differs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from flax.traverse_util import flatten_dict

if TYPE_CHECKING:
    from layerscope_jax.checkpoints.model import Model

ALL_OF = 1024
"""Numbers of an array that count in `weights_digest`."""


@dataclass(frozen=True, kw_only=True)
class ModelIdentity:
    """A model as far as its routing goes.

    Attributes:
        family, num_layers, hidden_size, num_experts, experts_per_token: as in `ModelConfig`.
        routers: digest of all routers' weights, the same whatever dtype holds them without loss.
    """

    family: str
    num_layers: int
    hidden_size: int
    num_experts: int
    experts_per_token: int
    routers: str

    @classmethod
    def of(cls, model: Model) -> ModelIdentity:
        """Reads the routers back from the device."""
        config, digest = model.config, hashlib.blake2b(digest_size=8)
        for layer in range(config.num_layers):
            digest.update(np.asarray(model.dense["layers"][layer]["router"]["weight"], np.float32).tobytes())
        return cls(
            family=config.family,
            num_layers=config.num_layers,
            hidden_size=config.hidden_size,
            num_experts=config.num_experts,
            experts_per_token=config.experts_per_token,
            routers=digest.hexdigest(),
        )

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> ModelIdentity:
        """Reads what `to_json` gave.

        Raises:
            ValueError: with what is missing or of another type.
        """
        if not isinstance(record, Mapping):
            raise ValueError(f"expected a model as an object, got {str(record)[:40]!r}")
        kinds = {field.name: str if field.name in ("family", "routers") else int for field in fields(cls)}
        wrong = [
            name
            for name, kind in kinds.items()
            if type(record.get(name)) is not kind or (kind is int and not 1 <= record[name] < 2**31)
        ]
        if wrong:
            raise ValueError(f"expected a model's {', '.join(kinds)}; missing or damaged: {', '.join(wrong)}")
        return cls(**{name: record[name] for name in kinds})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def check(self, other: ModelIdentity, what: str) -> None:
        """Refuses `what`, which was made for `other`, if that is another model than this one.

        Raises:
            ValueError: with every difference.
        """
        differing = [
            f"{name} {theirs} there, {ours} here"
            for name, ours in self.to_json().items()
            if (theirs := getattr(other, name)) != ours
        ]
        if differing:
            raise ValueError(f"{what} belongs to another model: {'; '.join(differing)}")


def weights_digest(model: Model) -> str:
    """Of every array of a model, the same whatever dtype holds its numbers without loss.

    All of a small array counts, and evenly spaced numbers of a large one.
    """
    found = hashlib.blake2b(digest_size=8)

    def count(name: str, array: np.ndarray) -> None:
        found.update(f"{name} {array.shape}".encode())
        flat = array.reshape(-1)
        if flat.size > ALL_OF:
            flat = flat[np.linspace(0, flat.size - 1, ALL_OF).astype(np.int64)]
        found.update(flat.astype(np.float32).tobytes())

    for path, leaf in sorted(
        (".".join(map(str, path)), leaf) for path, leaf in flatten_dict(model.dense).items()
    ):
        count(path, np.asarray(leaf))
    for expert in model.bank:
        for name, view in zip(model.bank.format.Expert._fields, model.bank.views(expert), strict=True):
            count(f"{expert} {name}", view)
    return found.hexdigest()
