"""Which of Megatron's arguments shape a GPT model: the one answer, needed without Megatron.

A checkpoint holds some 840 arguments. Most of them say how a model is trained, or where; this
module recognises those, by name or by family of names. Whatever it does not recognise may shape the
model, as an argument of a newer Megatron might: `shapes_the_model` is then true, and a converter
that does not know the argument refuses it.

Families (patterns with ``*``) are only for subjects that cannot touch a model's function, such as
checkpoint files or reinforcement learning. Arguments of attention, norms, experts or embeddings are
listed by their whole names, so that a new one is noticed. `tests/checkpoint/test_flags.py` compares
the tables with the installed Megatron.
"""

import functools
from fnmatch import fnmatchcase
from typing import Any

# Arguments that add parts to a model of plain decoder layers or replace parts of it, and the values
# at which they do not.
OTHER_PARTS: dict[str, tuple[Any, ...]] = {
    "multi_latent_attention": (False,),
    "attention_output_gate": (False,),
    "experimental_attention_variant": (None,),
    "linear_attention_freq": (None,),
    "quick_geglu": (False,),
    "mtp_num_layers": (None, 0),
    "mtp_standalone": (False,),
    "hybrid_layer_pattern": (None,),
    "hybrid_override_pattern": (None,),
    "is_hybrid_model": (False,),
    "spec": (None,),
    "heterogeneous_layers_config_path": (None,),
    "heterogeneous_layers_config_encoded_json": (None, ""),
    "yaml_cfg": (None,),
    "moe_latent_size": (None,),
    "moe_shared_expert_gate": (False,),
}
# Arguments that change what those parts compute, and the values at which they do not.
OTHER_COMPUTATION: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("rope",),
    "add_position_embedding": (True,),
    "rope_type": (None, "rope"),
    "no_rope_freq": (None,),
    "mrope_section": (None,),
    "softmax_type": ("vanilla",),
    "window_size": (None,),
    "qk_l2_norm": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "layernorm_zero_centered_gamma": (False,),
    "openai_gelu": (False,),
    "onnx_safe": (None, False),
    "glu_linear_offset": (0.0,),
    "activation_func_clamp_value": (None,),
    "use_mup": (False,),
    "te_precision_config_file": (None,),
    "use_kitchen_attention": (False,),
    "moe_router_num_groups": (None,),
    "moe_router_group_topk": (None,),
    "moe_router_force_load_balancing": (False,),
    "moe_router_force_biased": (None,),
    "moe_expert_capacity_factor": (None,),
    "moe_expert_rank_capacity_factor": (None,),
    "moe_pad_expert_input_to_capacity": (False,),
    "moe_apply_probs_on_input": (False,),
    "moe_input_jitter_eps": (None,),
    "moe_shared_expert_glu_interleave_size": (None,),
    "moe_mlp_glu_interleave_size": (None,),
    "moe_token_dropping": (False,),
}

# How the model was trained: recorded with an exported model. Parts that a plain GPT does not have
# are switched on by `OTHER_PARTS` and `OTHER_COMPUTATION`; their settings alone have no effect.
_TRAINING = {
    "data and the length of training": """
        seed seq_length *data_path mock_data split data_per_class_fraction sample_rate
        dataloader_inter_document_masking eod_mask_loss reset_attention_mask reset_position_ids
        variable_seq_lengths sft sft_tokenizer_prompt_format fim_* do_train do_valid do_test
        multiple_validation_sets validation_set_names full_validation mid_level_dataset_surplus
        train_iters train_samples eval_iters start_eval_at_iter iterations_to_skip iter_per_epoch
        phase_transition_iterations global_batch_size micro_batch_size eval_global_batch_size
        rampup_batch_size step_batch_size_schedule decrease_batch_size_if_needed perform_rl_step
        consumed_*_samples skipped_train_samples num_floating_point_operations_so_far
    """,
    "tokenizer": """
        tokenizer_* tiktoken_* null_tokenizer_* vocab_size vocab_file vocab_extra_ids merge_file
        special_tokens chat_template allow_ambiguous_pad_tokens make_vocab_size_divisible_by
    """,
    "optimizer": """
        optimizer lr lr_* min_lr head_lr_mult decoupled_* *weight_decay* clip_grad adam_*
        sgd_momentum lion_* muon_* exp_avg_* apply_wd_to_qk_layernorm override_opt_param_scheduler
        freeze_all_layers use_precision_aware_optimizer use_layer_wise_*
        dump_param_to_param_group_map main_grads_dtype main_params_dtype pin_cpu_grads
        pin_cpu_params outer_dp_sharding_strategy enable_full_sharding_in_hsdp
        suggested_communication_unit_size
    """,
    "precision": """
        bf16 fp16 fp8 fp8_* fp4 fp4_* keep_fp8_transpose_cache loss_scale loss_scale_window
        initial_loss_scale min_loss_scale hysteresis accumulate_allreduce_grads_in_fp32
        fp16_lm_cross_entropy fp32_residual_connection attention_softmax_in_fp32
        apply_query_key_layer_scaling first_last_layers_bf16 num_layers_at_start_in_bf16
        num_layers_at_end_in_bf16 transformer_impl test_mode
    """,
    "regularisation, losses and evaluation": """
        hidden_dropout attention_dropout embedding_init_method_std init_method_xavier_uniform
        perform_initialization calculate_per_token_loss qk_clip qk_clip_alpha qk_clip_threshold
        mlp_chunks_for_training mlp_chunks_for_prefill enable_chunked_prefill num_speculative_tokens
        max_tokens_to_oom use_legacy_static_engine moe_aux_loss_coeff moe_z_loss_coeff
        moe_router_bias_update_rate moe_router_dtype moe_router_load_balancing_type
        moe_router_quantile_balancing_ema moe_token_drop_policy moe_use_upcycling
        moe_upcycling_granularity logits_load_decode_threads logits_load_ignore_errors
        logits_load_kd_loss_alpha logits_load_prefetch_factor check_for_* verify_integrity
        record_shapes calc_ft_timeouts enable_ft_package deprecated_use_mcore_models
        use_rotary_position_embeddings decoder_num_layers decoder_seq_length
    """,
    "settings of parts that a plain GPT does not have": """
        mup_* mamba_* dsa_* linear_key_head_dim linear_value_head_dim linear_num_key_heads
        linear_num_value_heads mtp_loss_scaling_factor mtp_use_repeated_layer
        mtp_hybrid_override_pattern cache_mla_latents qk_head_dim qk_pos_emb_head_dim v_head_dim
        rotary_scaling_factor window_attn_skip_freq relative_attention_max_distance
    """,
    "our own settings, and other kinds of models": """
        topk_* bert_* ict_* dino_* vision_* img_* retriever_* output_bert_embeddings
        indexer_batch_size classes_fraction num_channels num_classes patch_dim swin_backbone_type
        mask_factor mask_prob mask_type query_in_block_prob short_seq_prob use_one_sent_docs
    """,
}
# Where and how it ran: this would differ elsewhere, so that no record has it.
_MACHINE = {
    "layout of ranks, and what they exchange": """
        *pipeline* *_parallel_size *tensor_parallel* data_parallel_* sequence_parallel
        hybrid_context_parallel hierarchical_context_parallel_sizes max_seqlen_per_dp_cp_rank
        cp_comm_type world_size rank local_rank distributed_* microbatch_group_size_per_vp_stage
        *gtp_weight_remat_size num_distributed_optimizer_instances use_distributed_optimizer
        use_gloo_process_groups use_tp_pp_dp_mapping use_ring_exchange_p2p create_all_gather_group
        fake_process_group lazy_mpu_init *overlap* tp_comm_* nccl_* *sharp* ddp_* *fsdp* align_*
        grad_reduce_in_bf16 gradient_reduce_div_fusion reuse_grad_buf_for_mxfp8_param_ag
        high_priority_a2a_comm_stream high_priority_stream_groups symmetric_ar_type
        disable_symmetric_registration refit_method
    """,
    "memory and kernels": """
        recompute_* *offload* *cuda_graph* distribute_saved_activations empty_unused_memory_level
        *wgrad* gradient_accumulation_fusion apply_rope_fusion bias_swiglu_fusion
        bias_dropout_fusion masked_softmax_fusion cross_entropy_loss_fusion
        cross_entropy_fusion_impl mla_down_proj_fusion fused_residual_rmsnorm no_persist_layer_norm
        *_backend use_flash_attn flash_attention_version flash_decode batch_invariant_mode
        deterministic_mode disable_bf16_reduced_precision_matmul disable_jit_fuser
        clone_scatter_output_in_embedding use_transformer_engine_op_fuser
        use_fused_weighted_squared_relu *grouped_gemm* use_mamba_mem_eff_path use_cpu_initialization
        init_model_with_meta_device te_rng_tracker enable_experimental *deepep* *hybridep* *ncclep*
        *_dispatcher_* moe_layer_recompute moe_paged_stash* moe_permute_fusion moe_router_fusion
        moe_router_padding_for_* moe_single_grouped_bias moe_single_grouped_weight
        moe_enable_routing_replay moe_per_layer_logging mtp_detach_heads
    """,
    "checkpoints and files": """
        load save save_* no_load_* no_save_* *ckpt* *checkpoint_args
        use_checkpoint_opt_param_scheduler pretrained_checkpoint finetune non_persistent_* async_*
        replication replication_* distrib_optim_fully_reshardable_mem_efficient iteration
        curr_iteration skip_train data_cache_path object_storage_cache_path data_args_path
        per_split_data_args_path per_dataset_sequences_path block_data_path evidence_data_path
        titles_data_path embedding_path metadata_path dataloader_* data_sharding mmap_bin_files
        num_workers num_dataset_builder_threads create_attention_mask_in_dataloader
        offset_sampling_seed_by_dp_rank trust_remote_code pad_vocab_size padded_vocab_size
        _is_global_batch_size_explicitly_specified eval_micro_batch_size
    """,
    "logging, faults, inference, reinforcement learning": """
        log_* logging_level *_interval timing_log_* tensorboard_* wandb_* *one_logger* app_tag_*
        config_logger_dir profile profile_* *pytorch_profiler* nvtx_ranges record_memory_history
        memory_snapshot_path barrier_with_L1_time *straggler* run_workload_inspector_server
        flight_recorder_* moe_routing_trace_* logits_* exit_* adlr_* inprocess_* rerun_mode
        result_rejected_tracker_filename error_injection_* fault_injector_* ft_num_warmup_iters
        manual_gc manual_gc_* enable_msc disable_msc_deprecated inference_* rl_* grpo_*
        langrl_env_config
    """,
    "ours, and settings of absent parts that no record has had so far": """
        topk_metrics topk_override topk_sparse_* topk_trust_checkpoint topk_verify kv_lora_rank
        q_lora_rank mscale mscale_all_dim yarn_* linear_conv_kernel_dim
        relative_attention_num_buckets encoder_num_layers encoder_seq_length biencoder_*
        dino_local_*
    """,
}

# Families are tried in this order: dino_local_* is in front of dino_*.
_TABLES = {
    subject: " ".join(table.values()).split()
    for subject, table in (("machine", _MACHINE), ("training", _TRAINING))
}


def shapes_the_model(name: str) -> bool:
    """Whether an argument may change what a trained GPT model computes.

    Args:
        name: as in Megatron's arguments, such as ``qk_layernorm``.

    Returns:
        False only for arguments that are known to leave a trained model's function alone.
    """
    return _subject(name) is None


def is_recorded(name: str) -> bool:
    """Whether the record of an exported model has an argument: not layout, machine or logging."""
    return _subject(name) != "machine"


@functools.cache
def _subject(name: str) -> str | None:
    """The table of an argument that has no effect on the model. Whole names precede families."""
    if name in OTHER_PARTS or name in OTHER_COMPUTATION:
        return None
    for subject, words in _TABLES.items():
        if name in words:
            return subject
    for subject, words in _TABLES.items():
        if any("*" in word and fnmatchcase(name, word) for word in words):
            return subject
    return None
