"""Identity of a model: traces and predictors made for another one are refused, with every difference."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from layerscope_jax.checkpoints.dense_weights import named_arrays
from layerscope_jax.scheduling.geometry import RoutedExperts
from layerscope_jax.support.json_fields import of_record

if TYPE_CHECKING:
    from layerscope_jax.checkpoints.model import Model

ALL_OF = 1024
"""Numbers of an array that `weights_digest` reads, at most."""


@dataclass(frozen=True, kw_only=True)
class ModelIdentity(RoutedExperts):
    """Everything of a model that its routing depends on.

    Attributes:
        family, hidden_size: as in `ModelConfig`.
        routers: digest of all routers' weights, the same whatever dtype holds them without loss.
    """

    family: str
    hidden_size: int
    routers: str

    @classmethod
    def of(cls, model: Model) -> ModelIdentity:
        """Returns the identity of a loaded model, whose routers are read back from the device."""
        routed, digest = model.geometry(0), hashlib.blake2b(digest_size=8)
        for router in model.routers():
            # As [D, E]: what was recorded or trained knows models by this.
            digest.update(np.asarray(router.weight, np.float32).T.tobytes())
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
        """Refuses something that was made for `other`, if that is another model than this one.

        Args:
            other: the model it was made for.
            what: its name, for the message.

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
    """Digest of every array of a model, the same whatever dtype holds its numbers without loss.

    A small array is read whole, of a large one evenly spaced numbers.
    """
    digest = hashlib.blake2b(digest_size=8)

    def count(name: str, array: np.ndarray) -> None:
        digest.update(f"{name} {array.shape}".encode())
        flat = array.reshape(-1)
        if flat.size > ALL_OF:
            flat = flat[np.linspace(0, flat.size - 1, ALL_OF).astype(np.int64)]
        digest.update(flat.astype(np.float32).tobytes())

    for name, array in sorted(named_arrays(model.dense), key=lambda named: named[0]):
        count(name, np.asarray(array))
    for expert in model.bank:
        for name, view in zip(model.bank.format.Expert._fields, model.bank.views(expert), strict=True):
            count(f"{expert} {name}", view)
    return digest.hexdigest()
