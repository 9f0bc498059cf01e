"""The tiny models of `make_goldens.py` whose layers do not all attend alike (`golden_cases.CASES`)."""

import transformers
from golden_cases import DEFAULT_ROPE

DELTA = {
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 20,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 4,
    "initializer_range": 0.25,
    "tie_word_embeddings": False,
}

MIXED_CASES = {
    "qwen3_next": {
        "seed": 21,
        "class": transformers.Qwen3NextConfig,
        "config": DELTA
        | {
            "intermediate_size": 40,
            "mlp_only_layers": [1],
            "full_attention_interval": 4,
            "rope_parameters": DEFAULT_ROPE | {"partial_rotary_factor": 0.25},
        },
        "moe_layers": [0, 2, 3],
        "must_matter": [
            {"norm_topk_prob": False},
            {"rope_parameters": DEFAULT_ROPE | {"partial_rotary_factor": 0.5}},
            {"rms_norm_eps": 1e-1},
        ],
    },
    "qwen3_5_moe": {
        "seed": 22,
        "class": transformers.Qwen3_5MoeConfig,
        "config": DELTA
        | {
            "num_hidden_layers": 3,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "rope_parameters": DEFAULT_ROPE | {"partial_rotary_factor": 0.25},
        },
        "beside": {
            "vision_config": {
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "out_hidden_size": 32,
                "num_position_embeddings": 16,
                "patch_size": 4,
            },
            "tie_word_embeddings": False,
        },
        "must_matter": [{"rms_norm_eps": 1e-1}],
    },
    "gemma4": {
        "seed": 23,
        "class": transformers.Gemma4Config,
        "config": {
            "intermediate_size": 20,
            "moe_intermediate_size": 24,
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "num_global_key_value_heads": 1,
            "head_dim": 8,
            "global_head_dim": 16,
            "enable_moe_block": True,
            "num_experts": 8,
            "top_k_experts": 3,
            "hidden_size_per_layer_input": 0,
            "attention_k_eq_v": True,
            "sliding_window": 8,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "final_logit_softcapping": 10.0,
            "pad_token_id": 0,
            "initializer_range": 0.3,
            "tie_word_embeddings": False,
        },
        "beside": {"initializer_range": 0.3, "tie_word_embeddings": False},
        "query_scale": 0.25,  # since scores are not scaled
        "must_matter": [{"final_logit_softcapping": None}, {"sliding_window": 7}, {"rms_norm_eps": 1e-1}],
    },
}
