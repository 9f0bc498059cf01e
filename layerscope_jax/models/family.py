"""Families of models (`Family`): how a Hugging Face architecture is read, named and written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from layerscope_jax.models.config import ModelConfig
from layerscope_jax.models.config_reader import HIDDEN_ACTS
from layerscope_jax.models.rope_config import write_rope, written_context
from layerscope_jax.models.weights import Weight


@dataclass(frozen=True, kw_only=True)
class Family:
    """One Hugging Face architecture: its settings, its weights, and the layer parts that only it has.

    Attributes:
        architecture: HF's class name, as in `architectures` of `config.json`.
        model_type: HF's short name, also used as `ModelConfig.family`.
        aliases: other names of the architecture, or of the `model_type`, in published configs.
        read_config: function from `config.json` as a dict to a `ModelConfig`; raises one ValueError that
            names everything that is wrong.
        write_config: the reverse, without `architectures` and `dtype`, and without `model_type` unless the
            language model alone has another one.
        weights: table of its tensors; see `layerscope_jax.models.weights`.
        ignored: names of tensors to ignore if the model has no place for them; `*` matches any text.
        extra_layers: whether checkpoints may hold layers behind the last one, which are ignored: they predict
            several tokens ahead.
        attentions, feed_forwards: its own kinds of layer parts, by their names in its configs; see
            `layerscope_jax.models.kinds`.
    """

    architecture: str
    model_type: str
    read_config: Callable[[Mapping[str, Any]], ModelConfig]
    write_config: Callable[[ModelConfig], dict[str, Any]]
    weights: tuple[Weight, ...]
    aliases: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ("lm_head.weight",)
    extra_layers: bool = False
    attentions: Mapping[str, Any] = field(default_factory=dict)
    feed_forwards: Mapping[str, Any] = field(default_factory=dict)

    def tensor_of(self, place: str) -> str | None:
        """Returns HF's tensor name for a place of the table; None if the table does not have the place."""
        return next((row.tensors[0] for row in self.weights if row.places == (place,)), None)


def write_layer_types(config: ModelConfig) -> dict[str, Any]:
    """Returns which layers attend within a window."""
    kinds = [config.layer_kind(layer).sliding_window for layer in range(config.num_layers)]
    names = ["full_attention" if window is None else "sliding_attention" for window in kinds]
    return {"layer_types": names, "sliding_window": config.sliding_window}


def write_shared(config: ModelConfig) -> dict[str, Any]:
    """Returns the settings that all built-in families share, as transformers 5 spells them."""
    stops = config.stop_token_ids
    return {
        "bos_token_id": None,
        "eos_token_id": None if not stops else stops[0] if len(stops) == 1 else list(stops),
        "head_dim": config.head_dim,
        "hidden_act": HIDDEN_ACTS[config.expert_body.activation],
        "hidden_size": config.hidden_size,
        "max_position_embeddings": written_context(config),
        "num_attention_heads": config.num_heads,
        "num_experts_per_tok": config.experts_per_token,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "pad_token_id": None,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": write_rope(config),
        "tie_word_embeddings": config.tie_embeddings,
        "vocab_size": config.vocab_size,
    }
