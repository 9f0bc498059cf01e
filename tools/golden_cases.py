"""The tiny models that `make_goldens.py` makes golden values of."""

import transformers

SHARED = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.35,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

# name -> config class, its arguments, the shard size, the layers with routers (all if not said), the folder
# (among the goldens if not said), and changes of the config that must change the logits: if one did not, the
# goldens could not tell whether an implementation honours that key.
CASES = {
    "olmoe": {
        "class": transformers.OlmoeConfig,
        "config": {
            "intermediate_size": 24,
            "num_key_value_heads": 4,
            "num_experts": 8,
            "num_experts_per_tok": 4,
            "norm_topk_prob": False,
            "clip_qkv": 1.5,
            "tie_word_embeddings": False,
        },
        "must_matter": [{"clip_qkv": None}, {"norm_topk_prob": True}, {"rms_norm_eps": 1e-1}],
    },
    "olmoe_normalised": {
        "class": transformers.OlmoeConfig,
        "config": {
            "intermediate_size": 24,
            "num_key_value_heads": 2,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "clip_qkv": None,
            "attention_bias": True,
            "initializer_range": 0.5,
            "tie_word_embeddings": True,
        },
        "must_matter": [{"norm_topk_prob": False}, {"clip_qkv": 1.0}],
    },
    "mixtral": {
        "class": transformers.MixtralConfig,
        "config": {
            "intermediate_size": 40,
            "num_key_value_heads": 2,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": None,
            "tie_word_embeddings": False,
        },
        "max_shard_size": "120KB",
        "must_matter": [{"sliding_window": 8}],
    },
    "mixtral_window": {
        "class": transformers.MixtralConfig,
        "config": {
            "intermediate_size": 28,
            "num_hidden_layers": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
            "tie_word_embeddings": False,
        },
        "must_matter": [{"sliding_window": None}, {"sliding_window": 7}, {"sliding_window": 9}],
    },
    "qwen3_moe": {
        "class": transformers.Qwen3MoeConfig,
        "config": {
            "intermediate_size": 56,
            "moe_intermediate_size": 24,
            "num_hidden_layers": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        },
        "must_matter": [
            {"norm_topk_prob": False},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        ],
    },
    "qwen3_moe_plain": {
        "class": transformers.Qwen3MoeConfig,
        "config": {
            "intermediate_size": 56,
            "moe_intermediate_size": 24,
            "num_key_value_heads": 4,
            "head_dim": 12,
            "num_experts": 8,
            "num_experts_per_tok": 4,
            "norm_topk_prob": False,
            "tie_word_embeddings": False,
        },
        "must_matter": [{"norm_topk_prob": True}, {"rms_norm_eps": 1e-1}],
    },
    "qwen3_moe_dense": {
        "class": transformers.Qwen3MoeConfig,
        "config": {
            "intermediate_size": 40,
            "moe_intermediate_size": 24,
            "num_hidden_layers": 7,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "initializer_range": 0.25,
            "tie_word_embeddings": False,
        },
        "moe_layers": [1, 5],
        "must_matter": [{"norm_topk_prob": False}],
    },
    "qwen2_moe": {
        "class": transformers.Qwen2MoeConfig,
        "folder": "examples/extend/qwen2_moe",
        "config": {
            "intermediate_size": 40,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 20,
            "num_hidden_layers": 4,
            "num_key_value_heads": 2,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "mlp_only_layers": [0],
            "qkv_bias": True,
            "tie_word_embeddings": False,
        },
        "moe_layers": [1, 2, 3],
        "must_matter": [{"norm_topk_prob": True}],
    },
}
