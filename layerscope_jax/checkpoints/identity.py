"""Which model something was made for: traces and predictors of another one are refused, with what differs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from flax.traverse_util import flatten_dict

from layerscope_jax.scheduling.geometry import RoutedExperts
from layerscope_jax.support.json_fields import of_record

if TYPE_CHECKING:
    from layerscope_jax.checkpoints.model import Model

ALL_OF = 1024
"""Numbers of an array that count in `weights_digest`."""


@dataclass(frozen=True, kw_only=True)
class ModelIdentity(RoutedExperts):
    """A model as far as its routing goes.

    Attributes:
        family, hidden_size: as in `ModelConfig`.
        routers: digest of all routers' weights, the same whatever dtype holds them without loss.
    """

    family: str
    hidden_size: int
    routers: str

    @classmethod
    def of(cls, model: Model) -> ModelIdentity:
        """Reads the routers back from the device."""
        routed, digest = model.geometry(0), hashlib.blake2b(digest_size=8)
        for router in model.routers():
            digest.update(np.asarray(router.weight, np.float32).tobytes())
        return cls(
            **routed.counts(),
            family=model.config.family,
            hidden_size=model.config.hidden_size,
            routers=digest.hexdigest(),
        )

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> ModelIdentity:
        """Reads what `to_json` gave.

        Raises:
            ValueError: with everything that is missing or not as it should be.
        """
        return of_record(cls, record, "model")

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
