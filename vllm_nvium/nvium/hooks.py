# SPDX-License-Identifier: Apache-2.0
"""Names of vLLM that N-vium overrides, replaces or reads as attributes; see `engine/hooks.py`."""

from vllm_nvium.engine.hooks import Hook, table

HOOKS: tuple[Hook, ...] = table(
    """
# Model Runner V2.
vllm.v1.worker.gpu.model_states resolve_model_state_cls
    asks the model for that class
    ! no N-vium on Model Runner V2
vllm.v1.worker.gpu.model_states.interface:ModelState initialize_kv_cache preprocess_state
        postprocess_state
    overridden to bracket one step
    ! no N-vium on Model Runner V2
vllm.v1.worker.gpu.model_states.default:DefaultModelState add_request remove_request prepare_attn
        prepare_inputs
    overridden to follow requests and to hand the model its step
    ! no N-vium on Model Runner V2
vllm.v1.worker.gpu.block_table:BlockTables append_block_ids block_tables block_sizes num_blocks
    wrapped to know on the host which blocks a request holds
    ! no N-vium on Model Runner V2
vllm.v1.worker.gpu.input_batch:InputBatch req_ids num_reqs idx_mapping_np query_start_loc_np
        num_computed_tokens_np prefill_len_np
    where every request of the step stands
    ! no N-vium on Model Runner V2
vllm.v1.worker.gpu.states:RequestState prompt_len
    tells prompt rows from generated ones
    ! no N-vium on Model Runner V2
vllm.model_executor.custom_op:CustomOp forward
    overridden: norms of exits run in one fused kernel
    ! exits are normed by vLLM's slower path
vllm.model_executor.layers.attention_layer_base:AttentionLayerBase get_attn_backend
        get_kv_cache_spec
    overridden by the side cache's layer
    ! the side cache is not allocated
vllm.model_executor.models.config:VerifyAndUpdateConfig verify_and_update_config
    overridden to check a start
    ! the check would never run
# What segments ask of the inner model of a parent; the other families have the same.
vllm.model_executor.models.llama:LlamaModel embed_input_ids norm
    begins the first segment and ends the last
    ! N-vium models of a Llama cannot be built
vllm.model_executor.models.llama:LlamaForCausalLM compute_logits logits_processor load_weights
    the final head, what others share with it, and the loading of the parent's weights
    ! N-vium models of a Llama cannot be built
vllm.config.scheduler:SchedulerConfig disable_hybrid_kv_cache_manager
    set, so that all layers share one block table
    ! N-vium models with sliding windows would lose K/V that waiting positions need
vllm.config.model:ModelConfig is_moe
    whether layers have experts, beside which some options are refused
    ! options that cannot work would be accepted
vllm.config.parallel:ParallelConfig data_parallel_size
    refused where layers have experts
    ! engines would wait for each other for ever
vllm.config.vllm:VllmConfig aux_output_config
    what of it is refused
    ! answers about experts would be wrong
vllm.config.aux_output:AuxOutputConfig enable_return_routed_experts
    refused
    ! answers about experts would be wrong
vllm.config.model:ModelConfig word_embeddings_untied_by_checkpoint
    corrected where exits have unembeddings of their own
    ! the final head of such a model would be random
vllm.v1.attention.backend:AttentionBackend get_builder_cls get_impl_cls get_name supported_dtypes
    overridden by the side cache's backend, which computes nothing
    ! the side cache is not allocated
vllm.v1.attention.backend:AttentionBackend supported_kv_cache_dtypes supported_kv_cache_layouts
    overridden by the side cache's backend, which computes nothing
    ! the side cache is not allocated
vllm.v1.attention.backend:AttentionMetadataBuilder build _cudagraph_support
    overridden by the side cache's backend, which needs no metadata
    ! the side cache is not allocated
vllm.v1.worker.gpu.model_states.default:DefaultModelState supports_prompt_embeds
    overridden: N-vium starts from token ids
    ! prompt embeddings would be accepted
vllm.v1.worker.gpu.model_states.interface:ModelState custom_sampler
    overridden to see which logits processors were built
    ! processors would not see the mixture
vllm.config.compilation:CompilationConfig static_forward_context
    the side cache's layer is entered there
    ! the side cache is not allocated
vllm._custom_ops rms_norm
    norms of exits run in this kernel
    ! exits are normed by vLLM's slower path
vllm.config.vllm:VllmConfig try_verify_and_update_config
    calls that check
    ! the check would never run
vllm.config.compilation:CompilationConfig cudagraph_mode cudagraph_capture_sizes
        max_cudagraph_capture_size
    CUDA graphs are switched off, or refused where they were asked for
    ! an N-vium model would run in CUDA graphs, which nobody has tried
vllm.v1.worker.gpu_model_runner:GPUModelRunner _model_forward
    overridden to hand each request's draw and frontier to the model
    ! no exits on Model Runner V1
vllm.sampling_params:SamplingParams top_p top_k min_p presence_penalty frequency_penalty
        repetition_penalty logit_bias allowed_token_ids bad_words min_tokens structured_outputs
        logprobs logprob_token_ids trace_decode_token_ids watermarking prompt_logprobs
        prompt_logprob_token_ids
    says whether a request may leave early without changing its law
    ! requests would be taken for plain ones
vllm.v1.worker.gpu_input_batch:InputBatch num_computed_tokens_cpu num_prompt_tokens_cpu_tensor
        logitsprocs
    where every request of the step stands, and whether something of the user's own changes logits
    ! no exits on Model Runner V1
vllm.v1.worker.gpu.sample.sampler:Sampler logits_processors
    tells whether something of the user's own changes logits
    ! processors would not see the mixture
vllm.v1.worker.gpu.model_runner:GPUModelRunner sample_tokens model_state
    wrapped to send along what the model state reports of a step
    ! no metrics of N-vium on Model Runner V2
vllm.v1.utils:CpuGpuBuffer np gpu
    host and device side of the runner's buffers
    ! no N-vium
vllm.v1.kv_cache_layout:KVCacheLayout LBHNC LBNHC
    layouts in which a block's slots follow each other, whatever is in them
    ! the side cache is not allocated
vllm.v1.kv_cache_interface:KVCacheSpec page_size_bytes
    overridden: what the states of a block take
    ! the side cache is not allocated
vllm.model_executor.layers.layernorm:RMSNorm variance_epsilon
    norms of exits run in one fused kernel
    ! exits are not normed
vllm.compilation.decorators _try_load_aot_compiled_fn
    what it loads stays on a module as `aot_compiled_fn`, whose guards are switched off
    ! guards are checked at every run of a segment
vllm.config.vllm:VllmConfig compilation_config
    the segments of a model are compiled by it
    ! no N-vium
vllm.config.parallel:ParallelConfig enable_dbo ubatch_size
    what splits a batch is refused
    ! no N-vium
vllm.config.model:ModelConfig enforce_eager enable_prompt_embeds quantization
    refused where N-vium cannot do it
    ! no N-vium
vllm.config.cache:CacheConfig block_size kv_sharing_fast_prefill
    the side cache has the KV cache's blocks
    ! the side cache is not allocated
vllm.config.load:LoadConfig load_format
    whether there is a checkpoint to look into before the start
    ! no N-vium
vllm.config.offload OffloadConfig.uva UVAOffloadConfig.cpu_offload_gb
    refused: offloading never sees the layers of an N-vium model
    ! it would be accepted and do nothing
vllm.config.speculative:SpeculativeConfig draft_model_config
    an N-vium model as a drafter is refused
    ! it would draft with its last exit only
vllm.v1.attention.backend:AttentionCGSupport NEVER
    what the side cache's backend says of CUDA graphs
    ! the side cache is not allocated
"""
)
