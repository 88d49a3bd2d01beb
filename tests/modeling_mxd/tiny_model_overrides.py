"""Sizes that make a model of any architecture tiny: by field name, then what single architectures need beyond that."""

from typing import Any

VOCABULARY = 96

_BY_VALUE: list[tuple[Any, str]] = [
    (91, "image_token_id image_token_index"),
    (92, "video_token_id"),
    (93, "audio_token_id"),
    (
        VOCABULARY,
        "vocab_size vocab_size_per_layer_input src_vocab_size tgt_vocab_size",
    ),
    (
        64,
        "num_position_embeddings max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length seq_length "
        "model_max_length max_2d_position_embeddings max_source_positions max_target_positions "
        "original_max_position_embeddings",
    ),
    (
        48,
        "intermediate_size ffn_dim d_ff dim_ff dff d_inner n_inner ffn_hidden_size decoder_ffn_dim encoder_ffn_dim "
        "hidden_dim moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size "
        "intermediate_size_mlp expert_ffn_hidden_size dense_intermediate_size shared_experts_intermediate_size "
        "moe_shared_expert_intermediate_size",
    ),
    (
        32,
        "hidden_size n_embd d_model dim n_dims emb_dim embed_dim embedding_size attention_hidden_size "
        "word_embed_proj_dim lru_width image_size projection_dim out_hidden_size",
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
        "depth num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers "
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
SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
SPEECH = {
    "conv_dim": [16, 16, 16],
    "conv_stride": [5, 2, 2],
    "conv_kernel": [10, 3, 3],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
WINDOWS = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 2, "patch_size": 4}
PYRAMID = {
    "num_encoder_blocks": 2,
    "depths": [2, 2],
    "hidden_sizes": [16, 32],
    "num_attention_heads": [2, 4],
    "sr_ratios": [2, 1],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "mlp_ratios": [2, 2],
}
CONVOLUTIONS = {
    "num_stages": 2,
    "depths": [2, 2],
    "hidden_sizes": [16, 32],
    "patch_size": 4,
    "layer_scale_init_value": 1.0,
}
OVERRIDES: dict[str, dict[str, Any]] = {
    "yolos": {"image_size": [32, 48]},
    # Rows are padded to a multiple of the window or block.
    "led": {"attention_window": 4},
    "longformer": {"attention_window": 4},
    "pegasus_x": {"block_size": 4, "num_global_tokens": 4},
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
    "gemma3n_text": {"layer_types": SLIDING_THEN_FULL, "num_kv_shared_layers": 2, "intermediate_size": 48},
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
    "moshi": {"sliding_window": 32},  # its cache is wrong past the window (transformers 5.23)
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
    "xmod": {"default_language": "en_XX"},
    "xlstm": {
        "hidden_size": 64,  # its cache rounds the widths of queries and values up to multiples of 64, its layers don't
        "qk_dim_factor": 1.0,
        "ffn_round_up_to_multiple_of": 16,
        "autocast_kernel_dtype": "float32",
    },
    "zamba": {
        "use_mamba_kernels": False,  # transformers 5.6 has no other way on a CPU
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
    # --- others -----------------------------------------------------------------------------------------------------
    "audio-spectrogram-transformer": {"max_length": 32, "frequency_stride": 4, "time_stride": 8},
    "blip-2": {"num_query_tokens": 4},
    "blip_2_qformer": {"encoder_hidden_size": 32},
    "blip_text_model": {"encoder_hidden_size": 32},
    "bros": {"hidden_size": 64},
    "canine": {"num_hash_buckets": 64},
    "convnext": CONVOLUTIONS,
    "convnextv2": CONVOLUTIONS,
    "cvt": {"embed_dim": [16, 32, 32], "depth": [1, 2, 3], "num_heads": [1, 2, 4]},
    "data2vec-audio": {**SPEECH, "num_conv_pos_embeddings": 3, "conv_pos_kernel_size": 5},
    "dinov3_vit": {"num_register_tokens": 2},
    "donut-swin": WINDOWS,
    "encoder-decoder": {"decoder": {"is_decoder": True, "add_cross_attention": True}},
    "focalnet": {"embed_dim": 16, "depths": [2, 2], "focal_levels": [2, 2], "focal_windows": [3, 3], "patch_size": 4},
    "fsmt": {"num_beams": 1},
    "funnel": {"block_sizes": [2, 2], "d_head": 8},
    "glpn": PYRAMID,
    "groupvit_vision_model": {"depths": [2, 1, 1], "num_group_tokens": [8, 4, 0], "num_output_groups": [8, 4, 4]},
    "groupvit": {"projection_intermediate_dim": 48},
    "hiera": {
        "image_size": [32, 32],
        "patch_size": [3, 3],
        "patch_stride": [2, 2],
        "patch_padding": [1, 1],
        "embed_dim": 8,
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 1, 2, 2],
    },
    "hubert": SPEECH,
    "instructblip": {"num_query_tokens": 4},
    "instructblip_qformer": {"encoder_hidden_size": 32},
    "internvl_vision": {"image_size": [32, 32], "patch_size": [8, 8]},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4},  # four of these and two of those make the hidden size
    "levit": {
        "image_size": 64,
        "patch_size": 16,
        "hidden_sizes": [16, 24, 32],
        "depths": [1, 1, 1],
        "num_attention_heads": [2, 2, 2],
        "key_dim": [8, 8, 8],
    },
    "lilt": {"hidden_size": 48},  # a multiple of 6, for the six coordinates of a box
    "luke": {"entity_vocab_size": 16, "entity_emb_size": 8},
    "lxmert": {
        "l_layers": 2,
        "x_layers": 2,
        "r_layers": 2,
        "visual_feat_dim": 16,
        "num_qa_labels": 4,
        "num_object_labels": 4,
        "num_attr_labels": 4,
    },
    "markuplm": {
        "max_depth": 4,
        "xpath_unit_hidden_size": 4,
        "max_xpath_tag_unit_embeddings": 16,
        "max_xpath_subs_unit_embeddings": 16,
        "tag_pad_id": 15,
        "subs_pad_id": 15,
    },
    "maskformer-swin": WINDOWS,
    "mobilebert": {"embedding_size": 16, "intra_bottleneck_size": 16},
    "moonshine": {
        "encoder_num_hidden_layers": 4,
        "decoder_num_hidden_layers": 4,
        "encoder_num_attention_heads": 4,
        "decoder_num_attention_heads": 4,
    },
    "patchtst": {"context_length": 32, "patch_length": 4, "patch_stride": 4},
    "patchtsmixer": {"context_length": 32, "patch_length": 4, "patch_stride": 4},
    "poolformer": {
        "num_encoder_blocks": 2,
        "depths": [2, 2],
        "hidden_sizes": [16, 32],
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "padding": [2, 1],
        "layer_scale_init_value": 1.0,
    },
    "pvt": {**PYRAMID, "sequence_reduction_ratios": [2, 1], "patch_sizes": [4, 2]},
    "pvt_v2": PYRAMID,
    "qwen2_vl_text": {"rope_parameters": SECTIONS},
    "qwen2_5_vl_text": {"rope_parameters": SECTIONS},
    "qwen3_vl_text": {"rope_parameters": SECTIONS},
    "qwen2_5_vl_vision": {"window_size": 16, "fullatt_block_indexes": [1, 3]},
    "qwen3_vl_vision": {"deepstack_visual_indexes": [1, 2]},
    "segformer": PYRAMID,
    "seggpt": {"image_size": [64, 32]},
    "sew": SPEECH,
    "sew-d": SPEECH,
    "siglip2_vision_model": {"num_patches": 16},
    "speecht5": SPEECH,
    "speech_to_text": {"input_feat_per_channel": 16, "conv_channels": 16},
    "swin": WINDOWS,
    "swinv2": WINDOWS | {"pretrained_window_sizes": [0, 0]},
    "unispeech": SPEECH,
    "unispeech-sat": SPEECH,
    "vjepa2": {
        "crop_size": 32,
        "frames_per_clip": 4,
        "pred_hidden_size": 32,
        "pred_num_attention_heads": 4,
        "pred_num_hidden_layers": 2,
    },
    "wav2vec2": SPEECH,
    "wav2vec2-bert": {"feature_projection_input_dim": 16},
    "wav2vec2-conformer": SPEECH,
    "wavlm": SPEECH,
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
GENERATE_FAILS: dict[str, str] = {
    "gemma4_unified_assistant": "drafts for another model, from that one's keys and values",
    "pop2piano": "its generate wants a composer, whose token comes from files",
    "reformer": "with a cache an einsum of its attention fails; without one it generates",
}

# Types whose unmodified tiny model generates other tokens with a cache than without (transformers 5.23) → what of its
# forward was seen; the causes weren't looked for.
CACHE_CHANGES_TOKENS: dict[str, str] = {
    "blt": "its forward of one more byte differs with the cache",
    "cpmant": "its forward of one more token doesn't take the cache",
    "musicgen": "its forward agrees with the cache; its generate doesn't",
    "prophetnet": "its forward differs with the cache, of the prompt as well",
    "rwkv": "its forward of one more token differs with the state; of several it agrees",
}

_BY_AUTO_CLASS = {
    "AutoModelForMaskedLM": "albert convbert deberta deberta-v2 distilbert esm eurobert flaubert fnet funnel gte ibert "
    "jina_embeddings_v3 layoutlm longformer luke mobilebert modernbert mpnet mra nomic_bert nystromformer squeezebert "
    "tapas yoso",
    "AutoModelForSeq2SeqLM": "bart bigbird_pegasus blenderbot blenderbot-small encoder-decoder fsmt led longt5 m2m_100 "
    "marian mbart mt5 mvp nllb-moe pegasus pegasus_x plbart prophetnet seamless_m4t switch_transformers t5 t5gemma "
    "t5gemma2 umt5",
    "AutoModelForSpeechSeq2Seq": "moonshine speech_to_text whisper speecht5 pop2piano",
    "AutoModelForImageTextToText": "aya_vision blip blip-2 idefics3 instructblip internvl llava mistral3 "
    "paligemma qwen2_vl qwen2_5_vl qwen3_vl smolvlm",
    "AutoModel": "canine splinter lilt markuplm bros layoutlmv3 vit vit_mae vit_msn deit beit data2vec-vision dinov2 "
    "dinov2_with_registers dinov3_vit ijepa hiera pvt pvt_v2 segformer yolos swin swinv2 "
    "siglip_vision_model siglip2_vision_model clip_vision_model aimv2_vision_model convnext convnextv2 poolformer "
    "levit videomae vivit timesformer vjepa2 pixtral sapiens2 seggpt donut-swin maskformer-swin cvt focalnet imagegpt "
    "internvl_vision mlcd_vision_model dpt glpn sam_vision_model "
    "audio-spectrogram-transformer wav2vec2 wav2vec2-bert wav2vec2-conformer hubert wavlm unispeech unispeech-sat sew "
    "sew-d data2vec-audio parakeet_encoder voxtral_encoder qwen2_audio_encoder "
    "clip clip_text_model siglip siglip2 chinese_clip altclip clipseg flava vilt visual_bert lxmert groupvit owlvit "
    "patchtst patchtsmixer decision_transformer dpr",
}

# Type that isn't a causal language model, or its encoder–decoder form → the auto class that builds it.
OTHER_TYPES: dict[str, str] = {name: auto for auto, names in _BY_AUTO_CLASS.items() for name in names.split()}
