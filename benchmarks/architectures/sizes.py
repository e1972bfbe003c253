"""How a configuration is made tiny: values by the name of its key, and what single types need besides."""

from __future__ import annotations

from typing import Any

_VALUES: list[tuple[Any, str]] = [
    # widths
    (32, "hidden_size d_model n_embd dim emb_dim embed_dim hidden word_embed_proj_dim projection_dim text_embed_dim"),
    (32, "output_dim lru_width true_hidden_size vision_output_dim out_hidden_size llm_dim"),
    (32, "model_dim qk_hidden_size output_proj_dims output_hidden_size"),
    (16, "embedding_size rank_emb low_rank_dim input_embedding_size q_lora_rank kv_lora_rank o_lora_rank image_size"),
    (48, "intermediate_size ffn_dim n_inner d_ff hidden_dim encoder_ffn_dim decoder_ffn_dim d_inner ffn_hidden_size"),
    (48, "dff inner_dim dim_ff intermediate_size_mlp projector_hidden_size feed_forward_size mlp_dim block_ff_dim"),
    (48, "shared_intermediate_size ffn_intermediate_size dense_intermediate_size"),
    (24, "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size expert_ffn_dim"),
    (24, "moe_shared_expert_intermediate_size moe_ffn_hidden_size"),
    (8, "head_dim d_kv attention_head_dim kv_channels attention_head_size swa_head_dim global_head_dim head_size"),
    (8, "linear_key_head_dim linear_value_head_dim d_head v_head_dim qk_head_dim index_head_dim"),
    (8, "mamba_d_head mamba_headdim mamba_head_dim patch_size num_mel_bins"),
    (4, "qk_rope_head_dim qk_nope_head_dim state_size mamba_d_state ssm_state_size d_state state_dim"),
    (4, "time_step_rank mamba_dt_rank"),
    # how many layers, heads, experts
    (2, "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers depth"),
    (2, "num_encoder_layers num_blocks encoder_num_layers num_attention_layers"),
    (4, "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_attn_heads"),
    (2, "num_key_value_heads num_kv_heads num_local_key_value_heads swa_num_key_value_heads num_query_groups"),
    (2, "num_global_key_value_heads linear_num_key_heads index_n_heads"),
    (4, "linear_num_value_heads index_topk"),
    (4, "num_experts n_routed_experts num_local_experts moe_num_experts num_routed_experts"),
    (2, "num_experts_per_tok moe_topk num_experts_per_token moe_top_k moe_k top_k_experts num_selected_experts"),
    (1, "n_group topk_group n_shared_experts num_expert_group"),
    (0, "first_k_dense_replace num_nextn_predict_layers mtp_num_hidden_layers mtp_num_layers"),
    # vocabularies and positions
    (64, "vocab_size n_vocab unpadded_vocab_size vocab_size_per_layer_input src_vocab_size tgt_vocab_size"),
    (64, "text_vocab_size max_position_embeddings n_positions n_ctx max_sequence_length max_seq_len"),
    (64, "max_source_positions max_target_positions max_encoder_position_embeddings num_position_embeddings"),
    (64, "max_decoder_position_embeddings original_max_position_embeddings"),
    (8, "sliding_window local_attention sliding_window_size attention_window window_size attention_chunk_size"),
    (8, "position_buckets"),
    (2, "type_vocab_size eos_token_id sep_token_id forced_eos_token_id"),
    (1, "bos_token_id decoder_start_token_id cls_token_id"),
    (0, "pad_token_id"),
    # what draws random numbers and is no dropout
    (0.0, "layerdrop encoder_layerdrop decoder_layerdrop drop_path_rate layer_dropout"),
    (0.0, "router_jitter_noise input_jitter_noise"),
]
BY_NAME: dict[str, Any] = {name: value for value, names in _VALUES for name in names.split()}
SPECIAL = ("pad_token_id", "eos_token_id", "bos_token_id", "decoder_start_token_id")
"""Keys that get their value where the default is None, too."""

_LATENT = {
    **{"num_key_value_heads": 4, "head_dim": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4},
    **{"v_head_dim": 8, "qk_head_dim": 8},
}
_LATENT_TYPES = (
    *("axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_linear"),
    *("glm4_moe_lite", "glm_moe_dsa", "youtu", "minicpm3", "mistral4", "solar_open", "longcat_flash"),
)
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_chunk_size": 8}

_OWN: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA, "mamba_expand": 2, "mamba_n_groups": 1, "mamba_d_ssm": 64, "attn_layer_indices": [1]},
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "blt": {
        **{"encoder_hash_byte_group_vocab": 16, "encoder_hash_byte_group_size": [3]},
        **{"encoder_hash_byte_group_nb_functions": 1},
    },
    "canine": {
        **{"num_hash_buckets": 64, "num_hash_functions": 4, "downsampling_rate": 2, "local_transformer_stride": 8},
    },
    "codegen": {"rotary_dim": 4, "n_ctx": 64},
    "deepseek_v2": {"num_experts_per_tok": 2, "moe_layer_freq": 1, "topk_method": "greedy"},
    "diffllama": {"attention_dropout": 0.0},
    "dots1": {
        **{"n_shared_experts": 1, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
        **{"num_experts_per_tok": 2},
    },
    "dots3_note_text": {"num_key_value_heads": 4},
    "esm": {"vocab_size": 64, "mask_token_id": 4, "token_dropout": False},
    "esmc": {"num_key_value_heads": 4},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "flaubert": {"mask_index": 5},
    "funnel": {"block_sizes": [1, 1], "d_head": 8, "num_decoder_layers": 1},
    "gemma3n_text": {
        **{"num_hidden_layers": 4, "num_kv_shared_layers": 2, "intermediate_size": 48, "laurel_rank": 8},
        **{"layer_types": ["sliding_attention", "full_attention"] * 2, "activation_sparsity_pattern": None},
        **{"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64},
    },
    "gemma4_text": {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {**_MAMBA, "mamba_expand": 2, "layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "kimi_linear": {"linear_num_heads": 4, "linear_head_dim": 8},
    "layoutlm": {"max_2d_position_embeddings": 64},
    "layoutlmv3": {"max_2d_position_embeddings": 64, "coordinate_size": 6, "shape_size": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"zero_expert_num": 2, "n_routed_experts": 4, "num_layers": 1},
    "longt5": {"decoder_start_token_id": 0, "local_radius": 7, "global_block_size": 4},
    "luke": {"entity_vocab_size": 20, "entity_emb_size": 16},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 2, "chunk_size": 8},
    "markuplm": {
        **{"max_depth": 3, "xpath_unit_hidden_size": 8, "max_xpath_tag_unit_embeddings": 16, "tag_pad_id": 15},
        **{"max_xpath_subs_unit_embeddings": 16, "subs_pad_id": 15},
    },
    "ministral": {"head_dim": 8},
    "mobilebert": {"intra_bottleneck_size": 16, "true_hidden_size": 16},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "nemotron_h": {
        **{"mamba_num_heads": 8, "n_groups": 1, "chunk_size": 8, "hybrid_override_pattern": None},
        **{"layers_block_type": ["mamba", "attention"]},
    },
    "neomme": {"head_dim": 16},
    "nystromformer": {"num_landmarks": 64, "segment_means_seq_len": 64},
    "perceiver": {
        **{"num_latents": 6, "d_latents": 32, "num_self_attends_per_block": 2, "num_self_attention_heads": 4},
        **{"num_cross_attention_heads": 4},
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 8},
    "reformer": {
        **{"axial_pos_embds": False, "attn_layers": ["local", "lsh"], "num_buckets": 4, "num_hashes": 1},
        **{"local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "feed_forward_size": 48, "hash_seed": 1},
    },
    "roc_bert": {
        **{"pronunciation_vocab_size": 64, "shape_vocab_size": 64, "pronunciation_embed_dim": 16},
        **{"shape_embed_dim": 16},
    },
    "rwkv": {"attention_hidden_size": 32, "context_length": 64},
    "squeezebert": {"embedding_size": 32},
    "switch_transformers": {
        "decoder_start_token_id": 0,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
    },
    "tapas": {"type_vocab_sizes": [3] * 7},
    "xlm": {"mask_index": 5},
    "zamba": {
        **{"n_mamba_heads": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "attention_head_dim": 16},
        **{"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "attention_hidden_size": 64},
    },
    "zamba2": {
        **{"n_mamba_heads": 8, "mamba_headdim": 8, "mamba_ngroups": 1, "chunk_size": 8, "num_mem_blocks": 1},
        **{"layers_block_type": ["mamba", "hybrid"], "adapter_rank": 8, "num_key_value_heads": 4},
        **{"attention_hidden_size": 64},
    },
    "zaya": {"num_experts_per_tok": 1},
}
BY_TYPE: dict[str, dict[str, Any]] = {
    name: {**(_LATENT if name in _LATENT_TYPES else {}), **_OWN.get(name, {})} for name in {*_OWN, *_LATENT_TYPES}
}
DECODERS = (
    *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"),
    *("reformer", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta"),
    *("xlm-roberta-xl", "xmod"),
)
"""Types that are causal language models with ``is_decoder`` only."""
