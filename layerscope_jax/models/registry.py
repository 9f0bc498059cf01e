"""Registry of the families that can be loaded, and the choice of the one that a `config.json` belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from layerscope_jax.models.config import ModelConfig
from layerscope_jax.models.config_reader import ConfigReader
from layerscope_jax.models.config_values import shown
from layerscope_jax.models.decoder_layers import DecoderLayer
from layerscope_jax.models.families.deepseek_v2 import DEEPSEEK_V2
from layerscope_jax.models.families.deepseek_v3 import DEEPSEEK_V3
from layerscope_jax.models.families.dots1 import DOTS1
from layerscope_jax.models.families.ernie4_5_moe import ERNIE4_5_MOE
from layerscope_jax.models.families.gemma4 import GEMMA4
from layerscope_jax.models.families.glm4_moe import GLM4_MOE
from layerscope_jax.models.families.glm4_moe_lite import GLM4_MOE_LITE
from layerscope_jax.models.families.gpt_oss import GPT_OSS
from layerscope_jax.models.families.granitemoe import GRANITEMOE
from layerscope_jax.models.families.minimax_m2 import MINIMAX_M2
from layerscope_jax.models.families.mixtral import MIXTRAL
from layerscope_jax.models.families.olmoe import OLMOE
from layerscope_jax.models.families.phimoe import PHIMOE
from layerscope_jax.models.families.qwen2_moe import QWEN2_MOE
from layerscope_jax.models.families.qwen3_5_moe import QWEN3_5_MOE
from layerscope_jax.models.families.qwen3_moe import QWEN3_MOE
from layerscope_jax.models.families.qwen3_next import QWEN3_NEXT
from layerscope_jax.models.family import Family
from layerscope_jax.models.kinds import ATTENTIONS, FEED_FORWARDS
from layerscope_jax.models.weights import EXPERTS, ROUTER, Weight
from layerscope_jax.support.checks import Problems

FAMILIES: dict[str, Family] = {}
"""All families, by `ModelConfig.family`; `register_family` adds to it."""


def register_family(family: Family) -> None:
    """Registers a family, so that its checkpoints load, run and save like those of the built-in families.

    `examples/extend/family.py` adds a family in a single file.

    Args:
        family: the family; no other family may have its `model_type` or `architecture`. Registering the same
            object again has no effect.

    Raises:
        ValueError: naming everything that is wrong: a value that is not a `Family`, a name that another
            family or layer part has, or a table without the embedding, the router or an expert's matrix.

    >>> register_family("qwen2_moe")
    Traceback (most recent call last):
    ValueError: family must be a layerscope_jax.models.Family, got 'qwen2_moe'
    """
    if not isinstance(family, Family):
        raise ValueError(f"family must be a layerscope_jax.models.Family, got {shown(family)}")
    if FAMILIES.get(family.model_type) is family:
        return
    problems = Problems()
    for name in ("architecture", "model_type"):
        problems.expect(isinstance(getattr(family, name), str), name, "HF's name", getattr(family, name))
    for name in ("read_config", "write_config"):
        problems.expect(callable(getattr(family, name)), name, "a function", getattr(family, name))
    problems.expect(isinstance(family.weights, tuple), "weights", "a tuple of Weight", family.weights)
    for name in ("attentions", "feed_forwards"):
        problems.expect(isinstance(getattr(family, name), Mapping), name, "a dict", getattr(family, name))
    _refuse(family, problems)
    for other in FAMILIES.values():
        for name in ("model_type", "architecture"):
            problems.expect(
                getattr(family, name) != getattr(other, name),
                name,
                f"different from that of the family {other.model_type} ({other.architecture})",
                getattr(family, name),
            )
    for name, part in family.attentions.items():
        fits = hasattr(part, "cache_shapes") and ATTENTIONS.get(name, part) is part
        problems.expect(fits, "attentions", "modules with cache_shapes, under names not yet taken", name)
    for name, part in family.feed_forwards.items():
        fits = isinstance(part, type) and issubclass(part, DecoderLayer)
        fits &= FEED_FORWARDS.get(name, part) is part
        problems.expect(fits, "feed_forwards", "subclasses of DecoderLayer, under names not yet taken", name)
    rows = [row for row in family.weights if isinstance(row, Weight)]
    problems.expect(len(rows) == len(family.weights), "weights", "a tuple of Weight", family.weights)
    missing = {"embedding", ROUTER, *(EXPERTS + matrix for matrix in ("gate", "up", "down"))}
    missing -= {place for row in rows for place in row.places}
    problems.expect(
        not missing,
        "weights",
        f"a table with embedding, routers and experts; it lacks {', '.join(sorted(missing))}",
        family.weights,
    )
    _refuse(family, problems)
    ATTENTIONS.update(family.attentions)
    FEED_FORWARDS.update(family.feed_forwards)
    FAMILIES[family.model_type] = family


def _refuse(family: Family, problems: Problems) -> None:
    try:
        problems.raise_any()
    except ValueError as error:
        raise ValueError(f"cannot register {shown(family.architecture)}: {error}") from None


for _family in (
    OLMOE,
    MIXTRAL,
    QWEN3_MOE,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    DOTS1,
    ERNIE4_5_MOE,
    GEMMA4,
    GLM4_MOE,
    GLM4_MOE_LITE,
    GPT_OSS,
    GRANITEMOE,
    MINIMAX_M2,
    PHIMOE,
    QWEN2_MOE,
    QWEN3_5_MOE,
    QWEN3_NEXT,
):
    register_family(_family)


def config_from_hf(config: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
    """Returns a model's configuration from its Hugging Face `config.json`, of transformers 4 or 5.

    Args:
        config: contents of `config.json`.
        generation: contents of `generation_config.json`; if it has an `eos_token_id`, that decides which
            tokens end a generation.

    Raises:
        ValueError: naming everything that is missing, malformed or not supported.

    >>> config_from_hf({"architectures": ["LlamaForCausalLM"]})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: expected one of the architectures OlmoeForCausalLM, ...
    """
    config = language_model(config)
    family = _family_of(config)
    try:
        found = family.read_config(config)
    except ValueError as error:
        raise ValueError(f"cannot use this config of {family.architecture}: {error}") from None
    return found if generation is None else with_generation(found, generation)


def language_model(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the config of the language model inside one that also takes images; others as they are."""
    inner = config.get("text_config")
    if not isinstance(inner, Mapping):
        return config
    shared = ("eos_token_id", "tie_word_embeddings", "dtype")
    beside = {key: config[key] for key in shared if key in config and inner.get(key) is None}
    return {**inner, **beside}


def with_generation(config: ModelConfig, generation: Mapping[str, Any]) -> ModelConfig:
    """Returns a configuration with the stop tokens of a `generation_config.json`, if it names any.

    Raises:
        ValueError: if they are outside the vocabulary.
    """
    if "eos_token_id" not in generation:
        return config
    reader = ConfigReader(generation)
    stop_token_ids = reader.stop_token_ids(config.vocab_size)
    reader.problems.raise_any()
    return replace(config, stop_token_ids=stop_token_ids)


def _family_of(config: Mapping[str, Any]) -> Family:
    """Returns the family of a `config.json`, by `architectures`, or by `model_type` if it names none."""
    architectures = config.get("architectures")
    if not isinstance(architectures, list | None):
        raise ValueError(f"architectures: expected a list of names, got {shown(architectures)}")
    for family in FAMILIES.values():
        if {family.architecture, *family.aliases} & set(map(str, architectures or ())):
            return family
        kinds = (family.model_type, f"{family.model_type}_text", *family.aliases)
        if not architectures and config.get("model_type") in kinds:
            return family
    supported = ", ".join(family.architecture for family in FAMILIES.values())
    found = f"{shown(architectures)} (model_type {shown(config.get('model_type'))})"
    raise ValueError(
        f"expected one of the architectures {supported}, got {found}; to support another one, add its family "
        "with layerscope_jax.models.register_family"
    )
