"""Writes a model as a Hugging Face folder (`save`)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from layerscope_jax.checkpoints.dense_weights import numbers
from layerscope_jax.checkpoints.model import Model
from layerscope_jax.checkpoints.safetensors_io import SINGLE, cast, dtype_named, write_tensors
from layerscope_jax.checkpoints.weight_names import Naming, family_of
from layerscope_jax.models import Decoder
from layerscope_jax.models.config import ModelConfig
from layerscope_jax.support.files import replace_files


def save(model: Model | Decoder, folder: str | Path, *, dtype: str | None = None) -> None:
    """Writes a model as `config.json` and `model.safetensors`, for `load` and transformers 5 or newer.

    Experts and dense layers are written unpacked, whatever their format. Both files are written under
    temporary names first, so that a failure leaves no incomplete files. Tokenizer files are not written: copy
    them into the folder.

    Args:
        model: model of any family that `load` reads.
        folder: created if needed; existing files of the same names are replaced.
        dtype: "float32", "bfloat16" or "float16" to convert to; None keeps the model's dtype.

    Raises:
        ValueError: if the family cannot express the model, or the folder cannot be written.
    """
    model = model if isinstance(model, Model) else Model.from_decoder(model)
    config, naming = model.config, Naming.of(model.config)
    target = np.dtype(model.bank.dtype) if dtype is None else dtype_named(dtype)
    settings = hf_config(config, target)
    dense = flatten_dict(model.dense)

    def array(key: Any) -> np.ndarray:
        if key in naming.experts:
            expert, name = key
            return np.asarray(getattr(model.bank.unpacked(expert), name))
        return numbers(dense[key])

    def value(name: str) -> np.ndarray:
        parts = []
        for source, part in naming.uses[name]:
            assert source.transform.save is not None, f"the first way to name {name} must be one to save"
            parts.append(source.transform.save([array(key) for key in source.keys])[part])
        stacked = naming.uses[name][0][0].tensors[naming.uses[name][0][1]][1] is not None
        return cast(np.stack(parts) if stacked else parts[0], dtypes[name], name)

    dtypes = {
        name: np.dtype(np.float32) if uses[0][0].keys[0] in naming.wide else target
        for name, uses in naming.uses.items()
    }
    replace_files(
        Path(folder),
        {
            SINGLE: lambda file: write_tensors(file, naming.shapes, dtypes, value),
            "config.json": json.dumps(settings, indent=2) + "\n",
        },
    )


def hf_config(config: ModelConfig, dtype: np.dtype) -> dict[str, Any]:
    """Returns the `config.json` of a model, with the keys of transformers 5.

    Raises:
        ValueError: naming the settings that its family cannot express.
    """
    family = family_of(config)
    settings = family.write_config(config)
    read_back = dataclasses.asdict(family.read_config(settings))
    lost = [
        f"{key}={value!r} (it would become {read_back[key]!r})"
        for key, value in dataclasses.asdict(config).items()
        if value != read_back[key]
    ]
    if lost:
        raise ValueError(f"{family.architecture} cannot express {', '.join(lost)}; use a family that can")
    named = {"architectures": [family.architecture], "model_type": family.model_type, "dtype": dtype.name}
    return dict(sorted((named | settings).items()))
