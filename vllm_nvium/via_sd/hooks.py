# SPDX-License-Identifier: Apache-2.0
"""Names of vLLM that VIA-SD overrides, replaces or reads as attributes; see `engine/hooks.py`."""

from vllm_nvium.engine.hooks import Hook, table

HOOKS: tuple[Hook, ...] = table(
    """
# VIA-SD: start-up.
vllm.engine.arg_utils:EngineArgs speculative_config scheduler_cls worker_cls async_scheduling
        enable_lora
    set while vLLM makes its configuration for a start with --via-sd
    ! no VIA-SD
vllm.config.model:ModelConfig head_dtype hf_text_config max_model_len logprobs_mode get_hidden_size
        get_head_size get_num_attention_heads get_num_kv_heads get_vocab_size
    says whether the target can lose layers
    ! no VIA-SD
vllm.config.speculative:SpeculativeConfig num_speculative_tokens uses_draft_model
        parallel_drafting rejection_sample_method
    which drafter a window is grown with
    ! no VIA-SD
vllm.sampling_params:SamplingParams max_tokens ignore_eos all_stop_token_ids logit_bias min_tokens
    where a window has to end, and what is too long to be made anew for each of its rows
    ! windows would go past the end of a request
vllm.config.offload:OffloadConfig offload_backend uva
    refused, because layers that fetch each other's weights cannot be skipped
    ! a slim pass would run layers with the weights of others
vllm.config.offload:UVAOffloadConfig cpu_offload_gb
    refused where layers fetch offloaded weights by themselves
    ! a slim pass would run the target's own weights
vllm.envs VLLM_WEIGHT_OFFLOADING_DISABLE_UVA
    whether layers fetch offloaded weights by themselves
    ! a slim pass would run the target's own weights
vllm.config.vllm:VllmConfig compilation_config num_speculative_tokens
    where vLLM captures graphs of whole windows
    ! sizes that are too small are refused by a worker, late
vllm.config.compilation:CompilationConfig cudagraph_mode cudagraph_capture_sizes
        max_cudagraph_capture_size
    where vLLM captures graphs of whole windows
    ! sizes that are too small are refused by a worker, late
vllm.config.compilation:CUDAGraphMode decode_mode
    where vLLM captures graphs of whole windows
    ! sizes that are too small are refused by a worker, late
vllm.config.vllm:VllmConfig device_config
    for which device there have to be kernels
    ! a kind without a kernel is refused by a worker, late
vllm.config.device:DeviceConfig device_type
    for which device there have to be kernels
    ! a kind without a kernel is refused by a worker, late
# VIA-SD: the runner.
vllm.v1.worker.gpu_model_runner:GPUModelRunner _sample propose_draft_token_ids _dummy_run
        _dummy_sampler_run
    overridden to verify drafts with the sampler of plain decoding, to choose their number, to
        compile the slim verifier at start and to count the memory of its windows
    ! no VIA-SD
vllm.v1.worker.gpu_model_runner:GPUModelRunner execute_model_state sampler speculative_config
        drafter max_model_len requests
    what a step has, and the drafter that is called again inside a window
    ! no VIA-SD
vllm.v1.worker.gpu_model_runner:GPUModelRunner _draft_token_ids _draft_token_req_ids
    a window is handed over in the place of the drafter's answer
    ! no VIA-SD
vllm.v1.worker.gpu_input_batch:InputBatch num_tokens_no_spec num_prompt_tokens token_ids_cpu
        sampling_metadata spec_token_ids req_output_token_ids req_id_to_index logitsprocs
        thinking_budget_state_holder presence_penalties_reqs frequency_penalties_reqs
        repetition_penalties_reqs
    the tokens that a window starts from, and what its requests ask of the sampler
    ! no VIA-SD
vllm.v1.sample.metadata:SamplingMetadata temperature all_random top_k top_p generators
        max_num_logprobs logprob_token_ids prompt_token_ids frequency_penalties presence_penalties
        repetition_penalties no_penalties output_token_ids spec_token_ids allowed_token_ids_mask
        bad_words_token_ids logitsprocs thinking_budget_state_holder
    repeated for the rows behind drafts, so that each is sampled as in plain decoding
    ! sampled tokens would follow another law
vllm.v1.sample.sampler:Sampler apply_logits_processors apply_temperature sample
    draws the tokens of both models; its generators are gone through in the order of rows
    ! sampled tokens would follow another law
vllm.v1.sample.logits_processor.builtin MinTokensLogitsProcessor.min_toks
        LogitBiasLogitsProcessor.biases MinPLogitsProcessor.min_p_count
    tell whether a request of the batch asks for them
    ! drafts would be kept that a request forbids
vllm.v1.sample.logits_processor:AdapterLogitsProcessor req_info
    tells which requests a custom processor applies to
    ! requests would get drafts whose logits change with every token
vllm.v1.sample.logits_processor.state:LogitsProcessors all argmax_invariant non_argmax_invariant
    the processors of a batch, made anew for the rows behind drafts
    ! sampled tokens would follow another law
vllm.v1.sample.thinking_budget_state:ThinkingBudgetStateHolder in_spec_mode has_tracked_requests
        update_state apply_to_logits
    told that requests with a budget have no drafts
    ! the end of thinking would be forced on another request
vllm.v1.spec_decode.metadata:SpecDecodeMetadata num_draft_tokens
    how many drafts are verified
    ! no VIA-SD
vllm.v1.spec_decode.ngram_proposer:NgramProposer propose
    called again inside a window
    ! one round per window with n-grams
vllm.v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer propose kv_cache_gid
    called again inside a window
    ! one round per window with draft models
vllm.v1.core.sched.output:SchedulerOutput scheduled_spec_decode_tokens num_scheduled_tokens
        num_spec_tokens_to_schedule preempted_req_ids
    what a step verifies, and how many drafts are asked for
    ! no VIA-SD
vllm.v1.outputs:ModelRunnerOutput sampled_token_ids
    what the full model made of a window; the counts travel to the scheduler as an added attribute
    ! no metrics of VIA-SD and no measured acceptances
vllm.v1.outputs SamplerOutput.sampled_token_ids SamplerOutput.logprobs_tensors
        LogprobsTensors.logprob_token_ids LogprobsTensors.logprobs
        LogprobsTensors.selected_token_ranks
    what was sampled behind drafts, handed on as of a rejection sampler
    ! no VIA-SD
# VIA-SD: the scheduler and the metrics.
vllm.v1.core.sched.scheduler:Scheduler num_lookahead_tokens num_spec_tokens
    overridden to reserve KV slots for a window
    ! windows would be written into blocks of other requests
vllm.v1.core.sched.scheduler:Scheduler schedule
    overridden to shorten drafts that a step has no room for, and to tell the runner of
        conversations that go on, which get no drafts
    ! a next turn would read tokens behind the end of the last, and requests would miss steps
vllm.v1.core.sched.scheduler:Scheduler update_draft_token_ids
    overridden: a structured output has no drafts from a token on that may end it
    ! under guidance and `ignore_eos` such a request would end with an error
vllm.v1.core.sched.scheduler:Scheduler running waiting kv_holding_waiting max_num_scheduled_tokens
        max_num_active_reqs num_waiting_for_streaming_input
    what a step has to have room for beside drafts
    ! requests would have no token in a step
vllm.config.scheduler:SchedulerConfig enable_chunked_prefill long_prefill_token_threshold
        long_prefill_token_threshold_adaptive
    what a step has to have room for beside drafts
    ! requests would have no token in a step
vllm.config.speculative:SpeculativeConfig max_num_new_slots_for_drafting
    what a step has to have room for beside drafts
    ! requests would have no token in a step
vllm.v1.request:RequestStatus WAITING PREEMPTED WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
    whose prompts may begin
    ! requests would have no token in a step
vllm.v1.core.sched.output:SchedulerOutput total_num_scheduled_tokens
    whether a prompt has begun, or nothing was left for one
    ! room would be kept for prompts that cannot begin
vllm.v1.outputs:DraftTokenIds req_ids
    whose drafts have come
    ! drafts of structured outputs could not be cut
vllm.v1.request:Request spec_token_ids num_tokens use_structured_output sampling_params status
    its drafts, and what it needs without them
    ! drafts could not be shortened
vllm.v1.request:Request resumable
    tells conversations that go on from other requests
    ! a conversation could not be told from other requests
vllm.v1.core.sched.scheduler:Scheduler dynamic_sd_lookup scheduler_config
    a table of draft counts, so that new requests are not padded with drafts that nobody made
    ! seeds would draw other tokens where a prompt is cached
vllm.v1.worker.gpu_model_runner:GPUModelRunner effective_drafter_max_model_len
    how far a draft model can go on in a window
    ! a draft model would be run past its context
vllm.v1.worker.gpu_model_runner:GPUModelRunner _input_fits_in_drafter
    overridden: drafters are asked for fewer tokens than a window has
    ! nobody has drafts while one text is a window away from the end of the context
vllm.engine.arg_utils:EngineArgs spec_method spec_model spec_tokens
    short flags that name a drafter too
    ! they would be overlooked beside --via-sd
vllm.v1.worker.gpu_model_runner build_logitsprocs GPUModelRunner.max_num_tokens
        GPUModelRunner.max_num_reqs
    replaced while a runner is made; most rows of a slim pass, and of logits in a step
    ! no VIA-SD
vllm.v1.worker.gpu_input_batch:CachedRequestState sampling_params generator
    what a request asks of the sampler and draws from
    ! no VIA-SD
vllm.v1.engine.input_processor:InputProcessor speculative_config
    taken away, because its checks refuse what rejection samplers cannot apply
    ! min_p and logit_bias are answered with status 400
vllm.v1.worker.gpu_model_runner:GPUModelRunner execute_model
    overridden to bracket one step
    ! no VIA-SD
vllm.v1.core.sched.output:CachedRequestData req_ids num_output_tokens
    which requests of a step have generated something
    ! prompts would be counted as decoding
vllm.config.vllm:VllmConfig attention_config structured_outputs_config
    what needs Model Runner V2, or cannot take tokens back, is refused
    ! vLLM would refuse a runner that the user never chose, or every structured output
vllm.model_executor.model_loader.base_loader process_weights_after_loading
    replaced while a model is loaded: weights are read before they are packed
    ! no slim verifier at low precision
vllm.model_executor.layers.linear LinearBase.quant_method RowParallelLinear.output_partition_sizes
    replaced in a layer that multiplies with a copy of its weight; layers that are fused
    ! no slim verifier at low precision
vllm._custom_ops _supports_onednn create_onednn_scaled_mm onednn_scaled_int8_quant
        onednn_scaled_mm CPUDNNLGEMMHandler.handler_tensor
    products of eight-bit matrices on CPU
    ! no slim verifier in eight bits on CPU
vllm._custom_ops scaled_int8_quant cutlass_scaled_mm
    products of eight-bit matrices on GPUs
    ! no int8 slim verifier on GPUs
vllm.config.attention:AttentionConfig hisparse_config
    what needs Model Runner V2 is refused
    ! vLLM would refuse a runner that the user never chose
vllm.config.parallel:ParallelConfig local_world_size tensor_parallel_size
    ranks of one machine share the memory that copies need; each has a part of every weight
    ! copies that do not fit would end a start without a word
vllm.model_executor.kernels.linear.base:Params weight_scale
    what the weights of a target in eight bits stand for
    ! no int4 slim verifier of a target in eight bits
vllm.config.scheduler:SchedulerConfig scheduler_cls
    another scheduler is refused
    ! windows would be written into blocks of other requests
"""
)
