"""Tensors of a checkpoint that generation does not need, each told by name and with the reason."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from layerscope_jax.models.config import ModelConfig
from layerscope_jax.models.family import Family

EXTRA_LAYER = re.compile(r"model\.layers\.(\d+)\.")

PARTS = {
    "*rotary_emb.inv_freq": "frequencies, which are computed",
    "mtp.*": "multi-token prediction",
    "model.mtp.*": "multi-token prediction",
    "visual.*": "vision tower",
    "model.visual.*": "vision tower",
    "vision_tower.*": "vision tower",
    "model.vision_tower.*": "vision tower",
    "model.embed_vision.*": "vision tower",
    "multi_modal_projector.*": "vision tower",
    "model.multi_modal_projector.*": "vision tower",
    "model.audio_tower.*": "audio tower",
    "model.embed_audio.*": "audio tower",
}
"""Parts that no family here has a place for: pattern of the names -> what they are."""


@dataclass(frozen=True)
class Ignored:
    """Tells which tensors of a checkpoint are passed over.

    Attributes:
        config: of the model.
        family: of the model, whose own patterns (`Family.ignored`) count too.
    """

    config: ModelConfig
    family: Family

    def why(self, name: str) -> str | None:
        """Returns what a tensor that has no place in the model is part of; None if it is not known.

        Layers after the last one predict further tokens ahead (`num_nextn_predict_layers`).
        """
        layer = EXTRA_LAYER.match(name)
        if layer is not None and self.family.extra_layers and int(layer[1]) >= self.config.num_layers:
            return "multi-token prediction"
        for pattern, part in PARTS.items():
            if fnmatchcase(name, pattern):
                return part
        for pattern in self.family.ignored:
            if fnmatchcase(name, pattern):
                return "not used by this family"
        return None

    def summary(self, names: Iterable[str]) -> dict[str, int]:
        """Returns how many of some tensors are passed over, by what they are."""
        return dict(Counter(why for name in names if (why := self.why(name)) is not None))
