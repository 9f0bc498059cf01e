"""Settings that several families share: latent attention, DeepSeek's routers and shared experts."""

from __future__ import annotations

from typing import Any

from layerscope_jax.models.config import LatentSizes, ModelConfig
from layerscope_jax.models.config_reader import ConfigReader
from layerscope_jax.models.rotary import RopeScaling, yarn_mscale
from layerscope_jax.models.routing_rules import RoutingRule


def read_latent(reader: ConfigReader, query_rank: int | None) -> LatentSizes:
    """Reads the sizes of latent attention.

    Args:
        reader: of the config.
        query_rank: the class's default where `q_lora_rank` is left out; an explicit null is no compression.
    """
    default = None if "q_lora_rank" in reader.config else query_rank
    sizes = LatentSizes(
        query_rank=reader.integer("q_lora_rank", default=default),
        rank=reader.integer("kv_lora_rank"),
        nope=reader.integer("qk_nope_head_dim"),
        rope=reader.integer("qk_rope_head_dim"),
        value=reader.integer("v_head_dim"),
    )
    # Some configs give sums of these too, or what transformers takes for the size of a head.
    reader.mark_read("qk_head_dim", "head_dim", "num_key_value_heads")
    return sizes


def latent_settings(reader: ConfigReader, shared: dict[str, Any], sizes: LatentSizes) -> dict[str, Any]:
    """Settings of attention of a model with latent attention, beside those that it shares with others."""
    return {
        "attention": "latent",
        "latent": sizes,
        "num_kv_heads": shared["num_heads"],
        "head_dim": sizes.nope + sizes.rope,
        "attention_scale": latent_scale(sizes, shared.get("rope_scaling")),
        "attention_bias": reader.flag("attention_bias", default=False),
    }


def latent_scale(sizes: LatentSizes, scaling: RopeScaling | None) -> float | None:
    """Returns what scores are multiplied with where YaRN changes that; None where it does not."""
    if scaling is None or not scaling.mscale_all_dim:
        return None
    return (sizes.nope + sizes.rope) ** -0.5 * yarn_mscale(scaling.factor, scaling.mscale_all_dim) ** 2


def write_latent(config: ModelConfig) -> dict[str, Any]:
    sizes = config.latent
    assert sizes is not None
    return {
        "attention_bias": config.attention_bias,
        "head_dim": sizes.rope,
        "kv_lora_rank": sizes.rank,
        "q_lora_rank": sizes.query_rank,
        "qk_nope_head_dim": sizes.nope,
        "qk_rope_head_dim": sizes.rope,
        "v_head_dim": sizes.value,
    }


def read_sigmoid_routing(reader: ConfigReader, *, groups: int, kept: int, scale: float) -> RoutingRule:
    """Reads the router of DeepSeek-V3 (arXiv 2412.19437): sigmoid scores, a bias for choosing, groups.

    Args:
        reader: of the config.
        groups, kept, scale: the class's defaults of `n_group`, `topk_group` and `routed_scaling_factor`.
    """
    reader.expect("scoring_func", "sigmoid", "other scores are not supported")
    reader.expect("topk_method", "noaux_tc", "other ways to choose are not supported")
    return RoutingRule(
        score="sigmoid",
        selection_bias=True,
        float32_logits=True,
        num_groups=reader.integer("n_group", default=groups),
        groups_per_token=reader.integer("topk_group", default=kept),
        group_score="two_best",
        epsilon=1e-20,
        scale=float(reader.number("routed_scaling_factor", default=scale)),
    )


def write_groups(config: ModelConfig) -> dict[str, Any]:
    return {
        "n_group": config.routing.num_groups,
        "norm_topk_prob": config.normalize_top_k,
        "routed_scaling_factor": config.routing.scale,
        "topk_group": config.routing.groups_per_token,
    }


def read_shared_experts(reader: ConfigReader, inner: int, default: int | None = None) -> int | None:
    """Reads `n_shared_experts`: so many experts, computed as one, that all tokens go through.

    Returns:
        The width of the one; None if there are none.
    """
    count = reader.count("n_shared_experts", default=default or 0)
    return count * inner or None


def write_deepseek_layers(config: ModelConfig) -> dict[str, Any]:
    """Returns the settings of dense layers and shared experts, as DeepSeek's configs spell them."""
    shared, inner = config.shared_intermediate_size or 0, config.moe_intermediate_size
    return {
        "first_k_dense_replace": len(config.dense_layers),
        "intermediate_size": config.intermediate_size or inner,
        "moe_intermediate_size": inner,
        "n_routed_experts": config.num_experts,
        "n_shared_experts": shared // inner,
    }


def read_deepseek_layers(
    reader: ConfigReader, num_layers: int, first: int, shared_experts: int | None
) -> dict[str, Any]:
    """Reads dense layers and shared experts, as DeepSeek's configs spell them.

    Args:
        reader: of the config.
        num_layers: of the model.
        first, shared_experts: the class's defaults of `first_k_dense_replace` and `n_shared_experts`.
    """
    dense = reader.first_dense(num_layers, default=first)
    inner = reader.integer("moe_intermediate_size")
    reader.expect("moe_layer_freq", 1, "MoE layers with dense ones between them are not supported")
    reader.mark_read("intermediate_size")
    return {
        "dense_layers": dense,
        "intermediate_size": reader.integer("intermediate_size") if dense else None,
        "moe_intermediate_size": inner,
        "shared_intermediate_size": read_shared_experts(reader, inner, shared_experts),
    }


AUTO_MAP = "auto_map"
"""Names the authors' own code, in the published configs of families that began with such code. Transformers
has classes of the same architectures, which are followed here."""

TRAINING_KEYS = ("aux_loss_alpha", "ep_size", "num_nextn_predict_layers", "num_mtp_layers", "seq_aux")
"""Keys of DeepSeek's configs and their kin that change no logit of the model itself."""
