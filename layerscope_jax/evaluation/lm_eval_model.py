"""The model `layerscope` of lm-eval (EleutherAI's evaluation harness); importing it registers the model."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from layerscope_jax.engine import Engine
from layerscope_jax.evaluation.harness import Harness, engine_of

LM: Any = object
"""The base class of lm-eval's models, if lm-eval is installed: it asks for it."""

with suppress(ModuleNotFoundError):
    from lm_eval.api.model import LM  # type: ignore[no-redef]


class LayerscopeLM(Harness, LM):
    """A model of lm-eval that runs in an engine.

    Args:
        pretrained: a checkpoint's folder or name on the hub, or an engine.
        max_length: as in `Harness`.
        batch_size, max_batch_size, device: what lm-eval gives every model; not used, because an engine forms
            its own batches (`max_num_seqs`, `prefill_chunk_size`) on the device of its model.
        **arguments: as in `engine_of`.
    """

    def __init__(
        self,
        pretrained: str | Engine,
        max_length: int | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
        **arguments: Any,
    ):
        LM.__init__(self)
        engine = pretrained if isinstance(pretrained, Engine) else engine_of(pretrained, **arguments)
        Harness.__init__(self, engine, max_length)


with suppress(ModuleNotFoundError):
    from lm_eval.api.registry import register_model

    register_model("layerscope")(LayerscopeLM)
