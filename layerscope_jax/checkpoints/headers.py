"""What is known of a checkpoint before any tensor is read: its configs, and the headers of its files."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from layerscope_jax.checkpoints.generation_defaults import generation_defaults
from layerscope_jax.checkpoints.ignored import Ignored
from layerscope_jax.checkpoints.other_formats import refuse_other_formats
from layerscope_jax.checkpoints.packed_tensors import PackedTensor
from layerscope_jax.checkpoints.quantised_tensors import encoding_of_experts, put_together, quantisation_of
from layerscope_jax.checkpoints.safetensors_io import DTYPES, StoredTensor, dtype_named, equal, stored_tensors
from layerscope_jax.checkpoints.weight_names import Naming, check_sizes, family_of, plain_names
from layerscope_jax.formats import ExpertFormat, QuantisedFormat, quantised
from layerscope_jax.models import config_from_hf, with_generation
from layerscope_jax.models.config import ModelConfig
from layerscope_jax.models.registry import language_model
from layerscope_jax.support.checks import Problems
from layerscope_jax.support.files import is_there, read_json

logger = logging.getLogger(__name__)

MODELOPT = "hf_quant_config.json"
"""Where ModelOpt's first versions write what later ones write into config.json."""

Tensor = StoredTensor | PackedTensor


class Headers(NamedTuple):
    """What the configs and headers of a Hugging Face folder say of a checkpoint.

    Attributes:
        config: shape of the model.
        raw: `config.json`.
        generation: settings of requests that the checkpoint recommends.
        naming: where the model's arrays come from.
        stored: the tensors that they are made of.
        dtype: what they are converted to, but for experts that are packed.
        format: of the experts; None for plain matrices of the dtype.
        as_stored: whether experts are packed in the checkpoint as they are to be.
    """

    config: ModelConfig
    raw: dict[str, Any]
    generation: dict[str, Any]
    naming: Naming
    stored: dict[str, Tensor]
    dtype: np.dtype
    format: ExpertFormat | None
    as_stored: bool


def read_headers(folder: Path, dtype: str | None, format: ExpertFormat | None = None) -> Headers:
    """Reads what is known of a Hugging Face folder before any tensor is read.

    Args:
        folder: of the checkpoint.
        dtype: what to convert to; None for the checkpoint's own.
        format: of the experts; None for the checkpoint's own.

    Raises:
        ValueError: as `load`.
    """
    refuse_other_formats(folder)
    config, raw, generation = read_configs(folder)
    config, stored = _with_head(config, put_together(folder, raw, plain_names(stored_tensors(folder))))
    check_sizes(config, folder, stored)
    if format is not None:  # refuses what the format cannot hold before anything is read
        format.for_body(config.expert_body).buffers(config.hidden_size, config.moe_intermediate_size)
    naming, ignored = Naming.of(config, stored.keys()), Ignored(config, family_of(config))
    naming.check(folder, stored, ignored)
    for part, count in ignored.summary(stored.keys() - naming.shapes.keys()).items():
        logger.info("%s: %d tensors are not needed and passed over: %s", folder, count, part)
    needed = {name: stored[name] for name in naming.shapes}
    target = dtype_named(dtype) if dtype is not None else common_dtype(folder, naming, needed, raw)
    encoding = encoding_of_experts(folder, naming, needed, format)
    if format is None and encoding is not None:
        format = quantised(encoding)
    as_stored = isinstance(format, QuantisedFormat) and format.encoding == encoding
    return Headers(config, raw, generation, naming, needed, target, format, as_stored)


def read_configs(folder: Path) -> tuple[ModelConfig, dict[str, Any], dict[str, Any]]:
    """Returns what a folder's configs say: the model's shape, `config.json`, and settings of requests."""
    file, generation = folder / "config.json", folder / "generation_config.json"
    raw = read_json(file)
    of_modelopt = folder / MODELOPT
    if raw.get("quantization_config") is None and is_there(of_modelopt):
        said = read_json(of_modelopt).get("quantization")
        raw["quantization_config"] = {
            "quant_method": "modelopt",
            "quant_algo": said.get("quant_algo") if isinstance(said, dict) else said,
        }
    try:
        config = config_from_hf(raw)
        quantisation_of(raw)  # refuses what is said beside the config of the language model
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    defaults: dict[str, Any] = {}
    if is_there(generation):
        settings = read_json(generation)
        problems = Problems()
        config = problems.check(with_generation, config, settings) or config
        defaults = problems.check(generation_defaults, settings)
        problems.raise_any(str(generation))
    return config, raw, defaults


def _with_head(config: ModelConfig, stored: Mapping[str, Tensor]) -> tuple[ModelConfig, Mapping[str, Tensor]]:
    """Ties head and embedding as transformers does: only if they are not two different tensors."""
    family = family_of(config)
    embedding, head = family.tensor_of("embedding"), family.tensor_of("head")
    if not config.tie_embeddings or embedding is None or head is None or head not in stored:
        return config, stored
    if embedding not in stored:
        return config, {**stored, embedding: stored[head]}
    one, other = stored[head], stored[embedding]
    if isinstance(one, StoredTensor) and isinstance(other, StoredTensor) and equal(one, other):
        return config, stored
    warnings.warn(
        f"{stored[head].file.parent}: config.json sets tie_word_embeddings, but {head} and {embedding} "
        "differ; both are used, as by transformers",
        stacklevel=4,
    )
    return dataclasses.replace(config, tie_embeddings=False), stored


def common_dtype(
    folder: Path, naming: Naming, stored: Mapping[str, Tensor], raw: Mapping[str, Any]
) -> np.dtype:
    """Returns the dtype that all tensors have that are not packed; if they differ, the one that `config.json`
    names."""
    codes = {
        stored[name].dtype
        for name, uses in naming.uses.items()
        if isinstance(stored[name], StoredTensor) and uses[0][0].keys[0] not in naming.wide
    }
    if len(codes) == 1:
        return DTYPES[codes.pop()]
    said = language_model(raw)
    named = said.get("dtype") or said.get("torch_dtype")
    if not isinstance(named, str) or named not in {dtype.name for dtype in DTYPES.values()}:
        raise ValueError(
            f"{folder}: expected tensors of one dtype, or config.json to name a dtype to convert them to; "
            f"got tensors of {', '.join(sorted(codes))} and the dtype {named!r}; choose a dtype with dtype="
        )
    return dtype_named(named)
