"""Sizes that make a model of any architecture tiny: by field name, then what single architectures need beyond that."""

from typing import Any

VOCABULARY = 96

_BY_VALUE: list[tuple[Any, str]] = [
    (
        VOCABULARY,
        "vocab_size vocab_size_per_layer_input",
    ),
    (
        64,
        "max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length seq_length model_max_length "
        "max_2d_position_embeddings max_source_positions max_target_positions original_max_position_embeddings",
    ),
    (
        48,
        "intermediate_size ffn_dim d_ff dim_ff dff n_inner ffn_hidden_size decoder_ffn_dim encoder_ffn_dim hidden_dim "
        "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size intermediate_size_mlp "
        "expert_ffn_hidden_size dense_intermediate_size shared_experts_intermediate_size "
        "moe_shared_expert_intermediate_size",
    ),
    (
        32,
        "hidden_size n_embd d_model dim n_dims emb_dim embed_dim embedding_size attention_hidden_size "
        "word_embed_proj_dim lru_width image_size",
    ),
    (
        16,
        "kv_lora_rank q_lora_rank o_lora_rank laurel_rank qk_head_dim mamba_d_head num_mel_bins",
    ),
    (
        8,
        "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim attention_head_dim d_kv rotary_dim "
        "query_pre_attn_scalar index_head_dim index_topk mamba_d_state state_size ssm_state_size linear_key_head_dim "
        "linear_value_head_dim patch_size hidden_size_per_layer_input",
    ),
    (6, "sliding_window"),
    (
        4,
        "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers "
        "num_encoder_layers num_attention_heads n_head n_heads num_heads encoder_attention_heads "
        "decoder_attention_heads num_encoder_attention_heads num_experts n_routed_experts num_local_experts "
        "moe_num_experts num_kv_heads index_n_heads mamba_n_heads mamba_num_heads mamba_dt_rank mamba_chunk_size "
        "time_step_rank chunk_size linear_num_value_heads",
    ),
    (3, "num_channels"),
    (
        2,
        "num_key_value_heads num_experts_per_tok moe_topk moe_k top_k_experts num_experts_per_token "
        "linear_num_key_heads eos_token_id",
    ),
    (1.0, "logit_scale"),
    (1, "n_group topk_group bos_token_id decoder_start_token_id first_k_dense_replace"),
    (0, "pad_token_id num_kv_shared_layers"),
]

# Field → value wherever a config has the field. Heads × head size = hidden size throughout.
SIZES: dict[str, Any] = {name: value for value, names in _BY_VALUE for name in names.split()}

# Model type (a sub-config's as well) → field → value; a dictionary under a sub-config's name changes that sub-config.
SLIDING_THEN_FULL = ["sliding_attention", "full_attention"] * 2
LINEAR_THEN_FULL = ["linear_attention", "full_attention"] * 2
OVERRIDES: dict[str, dict[str, Any]] = {
    # --- causal language models -------------------------------------------------------------------------------------
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt_local_encoder": {"hidden_size_global": 64},
    "blt_local_decoder": {"hidden_size_global": 64},
    "blt_global_transformer": {"hidden_size": 64},  # the bytes' width times cross_attn_k
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "encoder_hash_byte_group_size": [3, 4],
        "num_hidden_layers": 4,  # the cache reads it, and the config has none
    },
    "cohere_compass_text": {
        "layer_types": SLIDING_THEN_FULL,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
            "full_attention": None,
        },
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}, "ffn_config": {"moe_top_k": 2}},
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "dots3_note_vision_encoder": {
        "adapter_in_dim": 32,
        "adapter_out_dim": 32,
        "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
    },
    "dots3_note_audio_encoder": {
        "feature_size": 16,
        "downsample_hidden_size": 8,
        "adapter_input_size": 32,
        "adapter_out_dim": 32,
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma4_unified_vision": {"mm_embed_dim": 32, "mm_posemb_size": 16, "output_proj_dims": 32},
    "gemma4_unified_audio": {"audio_embed_dim": 32},
    "gemma3_text": {"layer_types": SLIDING_THEN_FULL},
    "gemma3n_text": {"layer_types": SLIDING_THEN_FULL, "num_kv_shared_layers": 2},
    "gemma4_text": {"global_head_dim": 16, "layer_types": SLIDING_THEN_FULL, "num_kv_shared_layers": 2},
    "gemma4_unified_text": {"global_head_dim": 16},
    "gemma4_unified_assistant": {
        "backbone_hidden_size": 32,
        "text_config": {"num_kv_shared_layers": 2, "layer_types": SLIDING_THEN_FULL},
    },
    "got_ocr2_vision": {"output_channels": 8, "mlp_dim": 48, "window_size": 2, "global_attn_indexes": [1, 3]},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 4},
    "granitemoehybrid": {"layer_types": LINEAR_THEN_FULL},
    "granitemoeshared": {"shared_intermediate_size": 0},
    "kolibri1": {"layer_types": SLIDING_THEN_FULL},
    "lfm3": {"layer_types": ["conv", "sliding_attention", "full_attention", "conv"]},
    "inkling_text": {
        "layer_types": ["hybrid_sliding", "hybrid"] * 2,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 8,
        "sliding_window_size": 6,
        "d_rel": 4,
        "rel_extent": 16,
        "logits_mup_width_multiplier": 1.0,
    },
    "inkling2_text": {
        "layer_types": ["hybrid_sliding", "hybrid"] * 2,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 8,
        "sliding_window_size": 6,
        "d_rel": 4,
        "rel_extent": 16,
        "unpadded_vocab_size": VOCABULARY,
        "n_layers_per_attn_res_block": 2,
    },
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": LINEAR_THEN_FULL, "linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "longcat_flash": {"zero_expert_num": 2, "num_layers": 2},  # two attentions and two dense MLPs in each
    "mamba2": {"head_dim": 16, "n_groups": 2},
    "musicgen_decoder": {"pad_token_id": VOCABULARY, "bos_token_id": VOCABULARY},  # no code of the codebooks
    "nemotron_h": {"n_groups": 2, "mamba_head_dim": 16},
    "phi4_multimodal_audio": {
        "num_blocks": 2,
        "ext_pw_out_channel": 32,
        "depthwise_separable_out_channel": 32,
        "nemo_conv_channels": 8,
        "input_size": 16,
        "bias_max_distance": 16,
        "chunk_size": -1,
        "audio_token_id": 90,
    },
    "phi4_multimodal_vision": {"crop_size": 32, "image_token_id": 91, "feature_layer": -2},
    "qwen4_exp_text": {
        "hc_lowrank": 16,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"] * 2,
        "attention_head_size": 8,
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [8, 24],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 2,
        "hash_seed": 0,  # else each forward hashes differently
        "feed_forward_size": 48,
    },
    "roc_bert": {
        "pronunciation_embed_dim": 32,
        "pronunciation_vocab_size": VOCABULARY,
        "shape_embed_dim": 32,
        "shape_vocab_size": VOCABULARY,
    },
    "xlnet": {"d_inner": 48},
    "xmod": {"default_language": "en_XX"},
    "xlstm": {
        "hidden_size": 64,  # its cache rounds the widths of queries and values up to multiples of 64, its layers don't
        "qk_dim_factor": 1.0,
        "ffn_round_up_to_multiple_of": 16,
        "autocast_kernel_dtype": "float32",
    },
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 64,  # its attention sees the embeddings beside the hidden states
        "attention_head_dim": 16,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "n_mamba_heads": 4, "adapter_rank": 4},
    "zaya": {
        "layer_types": ["hybrid", "hybrid_sliding"] * 2,
        "num_experts_per_tok": 1,  # the only number that the config takes
        "router_hidden_size": 16,
    },
}

# `type@variant` → field → value: other layouts of the same architecture.
VARIANTS: dict[str, dict[str, Any]] = {
    "bert@chunk": {"chunk_size_feed_forward": 1},
    "deepseek_v3@dense": {"first_k_dense_replace": 4},
    "falcon@newarch": {"new_decoder_architecture": True},
    "falcon@seq": {"parallel_attn": False},
    "gemma4_text@moe": {"enable_moe_block": True},
    "gemma4_text@wide": {"use_double_wide_mlp": True},
    "gpt_neox@seq": {"use_parallel_residual": False},
    "granitemoehybrid@dense": {"num_local_experts": 0},
    "granitemoeshared@shared": {"shared_intermediate_size": 48},
    "llama@bias": {"mlp_bias": True, "attention_bias": True},
    "llama4_text@interleave": {"interleave_moe_layer_step": 2},
    "opt@post": {"do_layer_norm_before": False},
    "qwen3_moe@mixed": {"mlp_only_layers": [1]},
    "stablelm@parallel": {"use_parallel_residual": True},
}

# Types that can't be built tiny without a network or further packages.
UNBUILDABLE: dict[str, str] = {
    "gemma3n": "its vision tower needs the package timm; its text model is gemma3n_text",
    "gemma4_assistant": "transformers 5.23 can't build it: its config demands that all layers share keys and values, "
    "which the text model then refuses",
}

# Types whose unmodified tiny model can't `generate`.
GENERATE_FAILS: dict[str, str] = {}
