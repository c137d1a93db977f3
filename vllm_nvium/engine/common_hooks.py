# SPDX-License-Identifier: Apache-2.0
"""Names of vLLM that both methods override, wrap, replace or read as attributes; see `hooks.py`."""

from vllm_nvium.engine import request_hooks
from vllm_nvium.engine.hooks import Hook, table

HOOKS: tuple[Hook, ...] = (
    *request_hooks.HOOKS,
    *table(
        """
# Start-up: registration, flags and checks.
vllm.config.vllm:VllmConfig use_v2_model_runner
    says which of the two model runners a start will use; wrapped for VIA-SD, which needs V1
    ! the wrong adapter would be chosen
vllm.engine.arg_utils:EngineArgs add_cli_args
    wrapped to add the --nvium-* flags
    ! the flags are missing from `vllm serve`
vllm.engine.arg_utils:EngineArgs from_cli_args
    wrapped to carry the flags into additional_config
    ! the flags do nothing
vllm.engine.arg_utils AsyncEngineArgs
    its constructor and that of EngineArgs are wrapped to take the flags as keyword arguments
    ! `LLM(..., via_sd=True)` is a TypeError
vllm.engine.arg_utils:EngineArgs create_engine_config
    wrapped to refuse --nvium-* flags on other models and to shorten refusals to a sentence
    ! a flag that does nothing is accepted
vllm.v1.engine.input_processor:InputProcessor _validate_params
    wrapped to check per-request overrides in the API process
    ! a bad override would reach the engine instead of being answered with 400
vllm.v1.engine.async_llm:AsyncLLM generate
    wrapped to check them before a streamed answer has begun
    ! a bad override of a streamed request would be answered with 200 and an error event
vllm.envs VLLM_USE_RUST_FRONTEND
    says whether requests pass through another front end
    ! a front end that does not check overrides would be accepted
vllm.sampling_params:SamplingParams temperature thinking_token_budget extra_args seed n
    the law that a request asks for
    ! requests would be taken for plain ones, or none could be read
# Parts of a target or of a parent; the other families have the same.
vllm.model_executor.models.llama LlamaForCausalLM.model LlamaModel.layers LlamaModel.embed_tokens
    the layers that are cut or left out, and the unembedding where weights are tied
    ! neither method finds its way in a model
# The side cache and catch-up passes.
vllm.v1.kv_cache_interface:KVCacheConfig kv_cache_groups
    the group of the side cache is found in it
    ! no N-vium on Model Runner V2
vllm.v1.attention.backend:CommonAttentionMetadata query_start_loc query_start_loc_cpu seq_lens
        seq_lens_cpu_upper_bound num_reqs num_actual_tokens max_query_len max_seq_len
        block_table_tensor slot_mapping causal positions
    describes the rows of a catch-up pass
    ! catch-up rows cannot be described to the attention backend
vllm.v1.worker.utils:AttentionGroup layer_names build_metadata
    makes the backend's own metadata for a catch-up pass
    ! catch-up rows cannot be described to the attention backend
vllm.forward_context:ForwardContext attn_metadata slot_mapping cudagraph_runtime_mode is_padding
    what a catch-up pass replaces and a step puts back
    ! catch-up would read and write the wrong slots
# Model Runner V1.
vllm.v1.worker.gpu_model_runner:GPUModelRunner _update_states
    overridden to see requests come and go
    ! no exits on Model Runner V1
vllm.v1.worker.gpu_model_runner:GPUModelRunner load_model initialize_kv_cache get_model
        input_batch attn_groups query_start_loc discard_request_mask sample_tokens
    the step's requests, blocks and layers are read from it
    ! no exits on Model Runner V1
vllm.v1.worker.gpu_input_batch:InputBatch req_ids num_reqs block_table generators
    where every request of the step stands
    ! no exits on Model Runner V1
vllm.v1.worker.block_table:BlockTable block_size slot_mapping get_numpy_array get_device_tensor
    the slots of waiting positions
    ! no exits on Model Runner V1
vllm.v1.core.sched.output:SchedulerOutput finished_req_ids scheduled_new_reqs
        scheduled_cached_reqs
    requests that come, go or were preempted
    ! requests cannot be followed
vllm.v1.core.sched.output:NewRequestData req_id sampling_params
    a new request's id and options
    ! requests cannot be followed
vllm.v1.core.sched.output:CachedRequestData resumed_req_ids
    requests whose blocks were taken away
    ! positions would be taken for complete that are not
vllm.v1.worker.cpu_worker:CPUWorker init_device
    overridden to build that runner
    ! no N-vium on CPU
vllm.v1.worker.gpu_worker:Worker _make_model_runner
    overridden to build the GPU runner
    ! no N-vium on GPUs with Model Runner V1
# Steps and their statistics, of both methods.
vllm.v1.worker.cpu_model_runner:CPUModelRunner initialize_kv_cache load_model
    overridden: what a method makes once there are a model and a cache
    ! neither method starts on CPU
vllm.v1.core.sched.scheduler:Scheduler _preempt_request
    wrapped to take back blocks that were planned and never computed
    ! under --scheduling-policy priority a prefix hit may read such a block
vllm.v1.core.sched.scheduler:Scheduler _free_request_blocks
    wrapped to take blocks of a request, which it gives back, out of the prefix cache
    ! a step of requests that find what others have left open may take very long
vllm.v1.core.sched.scheduler:Scheduler requests
    which positions a request has left open is kept with it; conversations that go on get no drafts
    ! others find open positions, and a conversation would read tokens behind the end of the last
vllm.v1.core.kv_cache_manager:KVCacheManager get_blocks evict_blocks
    find and take back those blocks
    ! as above
vllm.v1.core.sched.scheduler:Scheduler update_from_output make_stats
    overridden to add the counts of a step to its statistics
    ! no metrics
vllm.v1.metrics.stats:SchedulerStats kv_connector_stats
    the free-form field in which the counts cross to the API process
    ! no metrics
vllm.v1.metrics.loggers StatLoggerManager.__init__ StatLoggerManager.stat_loggers
        StatLoggerManager.engine_indexes
    the loggers of an engine, and the list that it is put into
    ! no metrics
vllm.v1.metrics.loggers:StatLoggerBase log log_engine_initialized record
    overridden by the methods' logger
    ! no metrics
vllm.v1.core.sched.scheduler:Scheduler kv_cache_manager kv_cache_config vllm_config
    find the blocks of a request that is preempted
    ! under --scheduling-policy priority a prefix hit may read blocks never computed
vllm.v1.core.kv_cache_utils:KVCacheBlock block_id block_hash
    find the blocks of a request that is preempted
    ! under --scheduling-policy priority a prefix hit may read blocks never computed
vllm.v1.kv_cache_interface KVCacheGroupSpec.kv_cache_spec KVCacheSpec.block_size
    find the blocks of a request that is preempted
    ! under --scheduling-policy priority a prefix hit may read blocks never computed
vllm.v1.request:Request request_id num_computed_tokens num_prompt_tokens num_in_flight_tokens
        num_stale_output_tokens
    find the blocks of a request that is preempted
    ! under --scheduling-policy priority a prefix hit may read blocks never computed
vllm.v1.worker.gpu_worker:Worker reload_weights update_weights finish_weight_update get_model
    wrapped: a model that has noticed something about its weights is told that they changed
    ! an N-vium model whose routers were constant keeps their hazards after an update
vllm.v1.worker.cpu_worker CPUWorker CPUModelRunner
    the worker on CPU, which makes its runner by a name that is replaced meanwhile
    ! neither method starts on CPU
vllm.v1.worker.gpu_model_runner:GPUModelRunner vllm_config model_config scheduler_config device
    what the runner was made for
    ! neither method starts on Model Runner V1
vllm.envs VLLM_USE_V2_MODEL_RUNNER
    whether the user has chosen a model runner
    ! VIA-SD would take another than the user's
vllm.engine.arg_utils:EngineArgs additional_config
    where flags and keyword arguments go
    ! no flags
vllm.config.vllm:VllmConfig additional_config model_config cache_config parallel_config
        scheduler_config load_config lora_config kv_transfer_config offload_config
        speculative_config watermark_config
    what a start was given
    ! what cannot work would be accepted
vllm.config.model:ModelConfig model revision architecture hf_config served_model_name seed
        runner_type
    which model it is; it names it in the metrics
    ! no start could be checked
vllm.config.scheduler:SchedulerConfig max_num_seqs max_num_batched_tokens async_scheduling
    bounds of a pass, and what VIA-SD sets
    ! neither method starts
vllm.config.parallel:ParallelConfig worker_cls pipeline_parallel_size
        prefill_context_parallel_size decode_context_parallel_size data_parallel_index
    the class of the worker, what is refused, and draws that differ between engines
    ! neither method starts on Model Runner V1
vllm.distributed.parallel_state:GroupCoordinator world_size rank_in_group broadcast
        broadcast_object
    ranks have to agree on what decides which layers and collectives run next
    ! tensor-parallel ranks would wait for each other for ever
vllm.config.cache:CacheConfig kv_offloading_size
    refused: it would move blocks that are not complete
    ! it would be accepted
vllm.config.load:LoadConfig download_dir
    where a checkpoint is looked for before the start
    ! checks of masks and checkpoints would not find it
vllm.config.offload OffloadConfig.prefetch PrefetchOffloadConfig.offload_group_size
    refused: layers that fetch each other's weights cannot be skipped
    ! it would be accepted
vllm.config.kv_transfer:KVTransferConfig kv_connector
    refused: it would move blocks that are not complete
    ! it would be accepted
vllm.config.speculative:SpeculativeConfig method model
    which drafter a window is grown with; N-vium refuses every one
    ! no start could be checked
vllm.platforms.interface:Platform device_name is_cpu is_cuda_alike
    which worker a start needs
    ! neither method starts on Model Runner V1
vllm.model_executor.models.registry:_ModelRegistry get_supported_archs register_model
    the N-vium architecture is entered there
    ! no N-vium
"""
    ),
)
