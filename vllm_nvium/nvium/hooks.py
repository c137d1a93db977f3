# SPDX-License-Identifier: Apache-2.0
"""Names of vLLM that N-vium overrides, replaces or reads as attributes; see `engine/hooks.py`."""

from vllm_nvium.engine.hooks import Hook, rows

HOOKS: tuple[Hook, ...] = (
    # Model Runner V2.
    *rows(
        "vllm.v1.worker.gpu.model_states",
        "",
        "resolve_model_state_cls",
        "asks the model for that class",
        "no N-vium on Model Runner V2",
    ),
    *rows(
        "vllm.v1.worker.gpu.model_states.interface",
        "ModelState",
        "initialize_kv_cache preprocess_state postprocess_state",
        "overridden to bracket one step",
        "no N-vium on Model Runner V2",
    ),
    *rows(
        "vllm.v1.worker.gpu.model_states.default",
        "DefaultModelState",
        "add_request remove_request prepare_attn prepare_inputs",
        "overridden to follow requests and to hand the model its step",
        "no N-vium on Model Runner V2",
    ),
    *rows(
        "vllm.v1.worker.gpu.block_table",
        "BlockTables",
        "append_block_ids block_tables block_sizes num_blocks",
        "wrapped to know on the host which blocks a request holds",
        "no N-vium on Model Runner V2",
    ),
    *rows(
        "vllm.v1.worker.gpu.input_batch",
        "InputBatch",
        "req_ids num_reqs idx_mapping_np query_start_loc_np num_computed_tokens_np prefill_len_np",
        "where every request of the step stands",
        "no N-vium on Model Runner V2",
    ),
    *rows(
        "vllm.v1.worker.gpu.states",
        "RequestState",
        "prompt_len",
        "tells prompt rows from generated ones",
        "no N-vium on Model Runner V2",
    ),
    *rows(
        "vllm.model_executor.custom_op",
        "CustomOp",
        "forward",
        "overridden: norms of exits run in one fused kernel",
        "exits are normed by vLLM's slower path",
    ),
    *rows(
        "vllm.model_executor.layers.attention_layer_base",
        "AttentionLayerBase",
        "get_attn_backend get_kv_cache_spec",
        "overridden by the side cache's layer",
        "the side cache is not allocated",
    ),
    *rows(
        "vllm.model_executor.models.config",
        "VerifyAndUpdateConfig",
        "verify_and_update_config",
        "overridden to check a start",
        "the check would never run",
    ),
    # What segments ask of the inner model of a parent; the other families have the same.
    *rows(
        "vllm.model_executor.models.llama",
        "LlamaModel",
        "embed_input_ids",
        "begins the first segment",
        "N-vium models of a Llama cannot be built",
    ),
    *rows(
        "vllm.model_executor.models.llama",
        "LlamaForCausalLM",
        "compute_logits load_weights",
        "the final head, and the loading of the parent's weights",
        "N-vium models of a Llama cannot be built",
    ),
    *rows(
        "vllm.config.scheduler",
        "SchedulerConfig",
        "disable_hybrid_kv_cache_manager",
        "set, so that all layers share one block table",
        "N-vium models with sliding windows would lose K/V that waiting positions need",
    ),
    *rows(
        "vllm.config.model",
        "ModelConfig",
        "word_embeddings_untied_by_checkpoint",
        "corrected where exits have unembeddings of their own",
        "the final head of such a model would be random",
    ),
    *rows(
        "vllm.v1.attention.backend",
        "AttentionBackend",
        "get_builder_cls get_impl_cls get_name supported_dtypes",
        "overridden by the side cache's backend, which computes nothing",
        "the side cache is not allocated",
    ),
    *rows(
        "vllm.v1.attention.backend",
        "AttentionBackend",
        "supported_kv_cache_dtypes supported_kv_cache_layouts",
        "overridden by the side cache's backend, which computes nothing",
        "the side cache is not allocated",
    ),
    *rows(
        "vllm.v1.attention.backend",
        "AttentionMetadataBuilder",
        "build _cudagraph_support",
        "overridden by the side cache's backend, which needs no metadata",
        "the side cache is not allocated",
    ),
    *rows(
        "vllm.v1.worker.gpu.model_states.default",
        "DefaultModelState",
        "supports_prompt_embeds",
        "overridden: N-vium starts from token ids",
        "prompt embeddings would be accepted",
    ),
    *rows(
        "vllm.v1.worker.gpu.model_states.interface",
        "ModelState",
        "custom_sampler",
        "overridden to see which logits processors were built",
        "processors would not see the mixture",
    ),
    *rows(
        "vllm.config.compilation",
        "CompilationConfig",
        "static_forward_context",
        "the side cache's layer is entered there",
        "the side cache is not allocated",
    ),
    *rows(
        "vllm._custom_ops",
        "",
        "rms_norm",
        "norms of exits run in this kernel",
        "exits are normed by vLLM's slower path",
    ),
)
