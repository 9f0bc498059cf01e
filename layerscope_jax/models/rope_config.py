"""Rotary embeddings in a Hugging Face `config.json`: of transformers 4 and 5, plain and scaled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from layerscope_jax.models.config_values import UNKNOWN, shown
from layerscope_jax.models.rotary import RopeScaling

if TYPE_CHECKING:
    from layerscope_jax.models.config import ModelConfig
    from layerscope_jax.models.config_reader import ConfigReader

KEYS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": (
        "factor",
        "attention_factor",
        "short_factor",
        "long_factor",
        "short_mscale",
        "long_mscale",
    ),
}
"""Kinds of scaling, and the keys that each reads."""

NEEDED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
"""And those that it cannot do without."""

SYNONYMS = {"su": "longrope"}

ALWAYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings")


def read_rope(
    reader: ConfigReader, theta: float, size: int, context: int, partial: float | None = None
) -> dict[str, Any]:
    """Reads the rotary embedding, which older and newer configs keep under different keys.

    As in transformers 5: an old `rope_scaling` replaces `rope_parameters`, whose own values beat those beside
    it.

    Args:
        reader: of the config; problems are collected there.
        theta: base, if none is given.
        size: numbers of a head that may be rotated.
        context: `max_position_embeddings`.
        partial: part of them that is rotated, if nothing is said of it; None if it can only be all.

    Returns:
        rope_theta, rotary_dim, rope_scaling and max_position_embeddings of a `ModelConfig`.
    """
    name = "rope_scaling" if reader.config.get("rope_scaling") else "rope_parameters"
    given = reader.config.get(name) or {}
    if not isinstance(given, Mapping):
        reader.problems.add(f"{name}: expected an object or null, got {shown(given)}")
        given = {}
    beside = ("rope_theta", "partial_rotary_factor", "rotary_dim", "original_max_position_embeddings")
    reader.mark_read("rope_scaling", "rope_parameters", *beside)
    inner = reader.inside(name, given)
    kind = given.get("rope_type", given.get("type", "default"))
    kind = SYNONYMS.get(kind, kind) if isinstance(kind, str) else kind
    if kind != "default" and kind not in KEYS:
        reader.problems.add(
            f"{name}: expected a rope_type among default, {', '.join(KEYS)}, got {shown(kind)}"
        )
        kind = "default"
    keys = KEYS.get(kind, ())
    for key, value in given.items():
        if key not in (*ALWAYS, *keys) and value is not None:
            reader.problems.add(f"{name}.{key}: {UNKNOWN}, got {shown(value)}")
    base = inner.number("rope_theta", default=None) or reader.number("rope_theta", default=theta)
    factor = inner.number("partial_rotary_factor", default=None)
    factor = factor or reader.number("partial_rotary_factor", default=None)
    if factor is None and (legacy := reader.integer("rotary_dim", default=None)) is not None:
        factor = legacy / size
    if partial is None and factor not in (None, 1.0):
        reader.problems.add(
            f"partial_rotary_factor: expected 1.0, got {factor}; other values are not supported"
        )
    factor = (partial or 1.0) if partial is None or factor is None else factor
    rotated = int(size * factor)
    if not 2 <= rotated <= size or rotated % 2:
        reader.problems.add(
            f"partial_rotary_factor: expected an even number of the {size} numbers of a head to be rotated, "
            f"got {factor} of them"
        )
    result: dict[str, Any] = {
        "rope_theta": float(base),
        "rotary_dim": None if rotated == size else rotated,
        "max_position_embeddings": context,
    }
    if kind != "default":
        for key in NEEDED[kind]:
            if given.get(key) is None:
                reader.missing.append(f"{name}.{key}")
        scaling = _scaling(reader, inner, kind, context, rotated)
        if kind == "dynamic":
            result["max_position_embeddings"] = int(context * scaling.factor)
        result["rope_scaling"] = scaling
    return result


def _scaling(reader: ConfigReader, inner: ConfigReader, kind: Any, context: int, rotated: int) -> RopeScaling:
    # Phi-3 and its kin have the original length beside the embedding, and that counts.
    original = reader.integer("original_max_position_embeddings", default=None)
    original = original or inner.integer("original_max_position_embeddings", default=context)
    if kind in ("linear", "dynamic"):
        original = context
    values: dict[str, Any] = {}
    for key in KEYS[kind]:
        if key in ("short_factor", "long_factor"):
            value = inner.numbers(key, default=())
            if value and len(value) != rotated // 2:
                reader.problems.add(f"{key}: expected {rotated // 2} numbers, got {len(value)}")
        elif key == "truncate":
            value = inner.flag(key, default=True)
        else:
            value = inner.number(key, default=None)
        if value is not None:
            values[key] = value if isinstance(value, bool | tuple) else float(value)
    if kind in ("yarn", "longrope"):
        values.setdefault("factor", context / original)
    return RopeScaling(kind=kind, original_max_position_embeddings=original, **values)


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """Returns `rope_parameters` of a model, as transformers 5 spells them."""
    head = config.head_dim if config.latent is None else config.latent.rope
    result: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if config.rotary_dim is not None:
        result["partial_rotary_factor"] = config.rotary_dim / head
    scaling = config.rope_scaling
    if scaling is None:
        return result
    plain = RopeScaling(kind=scaling.kind, original_max_position_embeddings=0)
    for key in KEYS[scaling.kind]:
        value = getattr(scaling, key)
        if value != getattr(plain, key) or key in NEEDED[scaling.kind] or key == "factor":
            result[key] = list(value) if isinstance(value, tuple) else value
    if scaling.kind not in ("linear", "dynamic"):
        result["original_max_position_embeddings"] = scaling.original_max_position_embeddings
    return result | {"rope_type": scaling.kind}


def written_context(config: ModelConfig) -> int:
    """Returns `max_position_embeddings` of a model: of one that grows dynamically, the context before."""
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "dynamic":
        return scaling.original_max_position_embeddings
    return config.max_position_embeddings
