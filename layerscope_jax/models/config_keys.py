"""Keys of a Hugging Face `config.json` that every family passes over, since they change no logit."""

from __future__ import annotations

from typing import Any

IDENTITY = """
    _commit_hash _name_or_path architectures dtype model_type name_or_path torch_dtype transformers_version
    unsloth_fixed unsloth_version
"""
"""What names the model, the code that wrote it, or how its weights lie."""

RUNNING = """
    _attn_implementation _attn_implementation_autoset _experts_implementation _flash_attn_2_enabled
    _moe_implementation attn_implementation chunk_size_feed_forward experts_implementation
    gradient_checkpointing output_attentions output_hidden_states output_router_logits output_scores
    pretraining_tp return_dict return_dict_in_generate torchscript use_cache
"""
"""How transformers runs it, and what it returns."""

TRAINING = """
    attention_dropout embd_pdrop embedding_dropout hidden_dropout initializer_range neftune_noise_alpha
    resid_pdrop router_aux_loss_coef router_jitter_noise router_z_loss_coef
"""

OTHER_TASKS = """
    classifier_dropout finetuning_task id2label keys_to_ignore_at_inference label2id num_labels problem_type
    task_specific_params
"""

TOKENIZER = """
    bos_token_id cls_token_id decoder_start_token_id mask_token_id model_max_length pad_token_id prefix
    sep_token_id tokenizer_class unk_token_id
"""

GENERATING = """
    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id
    length_penalty max_length max_new_tokens min_length min_new_tokens min_p no_repeat_ngram_size
    num_beam_groups num_beams num_return_sequences remove_invalid_values repetition_penalty suppress_tokens
    temperature top_k top_p typical_p
"""
"""Defaults of generating, which here each request gives itself."""

HARMLESS = frozenset((IDENTITY + RUNNING + TRAINING + OTHER_TASKS + TOKENIZER + GENERATING).split())

NEUTRAL: dict[str, Any] = {
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "mlp_bias": False,
    "pruned_heads": {},
    "rope_interleaved": False,
    "tf_legacy_loss": False,
    "tie_encoder_decoder": False,
    "use_bfloat16": False,
    "use_mrope": False,
}
"""Keys with the one value, beside null, that leaves everything as it is."""
