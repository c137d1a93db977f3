# SPDX-License-Identifier: Apache-2.0
"""Names of vLLM that both methods override, wrap, replace or read as attributes; see `hooks.py`."""

from vllm_nvium.engine.hooks import Hook, rows

HOOKS: tuple[Hook, ...] = (
    # Start-up: registration, flags and checks.
    *rows(
        "vllm.config.vllm",
        "VllmConfig",
        "try_verify_and_update_config",
        "calls that check",
        "the check would never run",
    ),
    *rows(
        "vllm.config.vllm",
        "VllmConfig",
        "use_v2_model_runner",
        "says which of the two model runners a start will use; wrapped for VIA-SD, which needs V1",
        "the wrong adapter would be chosen",
    ),
    *rows(
        "vllm.engine.arg_utils",
        "EngineArgs",
        "add_cli_args",
        "wrapped to add the --nvium-* flags",
        "the flags are missing from `vllm serve`",
    ),
    *rows(
        "vllm.engine.arg_utils",
        "EngineArgs",
        "from_cli_args",
        "wrapped to carry the flags into additional_config",
        "the flags do nothing",
    ),
    *rows(
        "vllm.engine.arg_utils",
        "",
        "AsyncEngineArgs",
        "its constructor and that of EngineArgs are wrapped to take the flags as keyword arguments",
        "`LLM(..., via_sd=True)` is a TypeError",
    ),
    *rows(
        "vllm.engine.arg_utils",
        "EngineArgs",
        "create_engine_config",
        "wrapped to refuse --nvium-* flags on other models and to shorten refusals to a sentence",
        "a flag that does nothing is accepted",
    ),
    *rows(
        "vllm.v1.engine.input_processor",
        "InputProcessor",
        "_validate_params",
        "wrapped to check per-request overrides in the API process",
        "a bad override would reach the engine instead of being answered with 400",
    ),
    *rows(
        "vllm.v1.engine.async_llm",
        "AsyncLLM",
        "generate",
        "wrapped to check them before a streamed answer has begun",
        "a bad override of a streamed request would be answered with 200 and an error event",
    ),
    *rows(
        "vllm.config.compilation",
        "CompilationConfig",
        "cudagraph_mode cudagraph_capture_sizes max_cudagraph_capture_size",
        "CUDA graphs are switched off, or refused where they were asked for",
        "an N-vium model would run in CUDA graphs, which nobody has tried",
    ),
    *rows(
        "vllm.envs",
        "",
        "VLLM_USE_RUST_FRONTEND",
        "says whether requests pass through another front end",
        "a front end that does not check overrides would be accepted",
    ),
    *rows(
        "vllm.sampling_params",
        "SamplingParams",
        "temperature top_p top_k min_p presence_penalty frequency_penalty repetition_penalty "
        "logit_bias allowed_token_ids bad_words min_tokens structured_outputs logprobs "
        "logprob_token_ids thinking_token_budget trace_decode_token_ids watermarking "
        "prompt_logprobs prompt_logprob_token_ids seed extra_args",
        "says whether a request may leave early without changing its law",
        "requests would be taken for plain ones, or none could be read",
    ),
    # The side cache and catch-up passes.
    *rows(
        "vllm.v1.kv_cache_interface",
        "KVCacheConfig",
        "kv_cache_groups",
        "the group of the side cache is found in it",
        "no N-vium on Model Runner V2",
    ),
    *rows(
        "vllm.v1.attention.backend",
        "CommonAttentionMetadata",
        "query_start_loc query_start_loc_cpu seq_lens seq_lens_cpu_upper_bound num_reqs "
        "num_actual_tokens max_query_len max_seq_len block_table_tensor slot_mapping causal "
        "positions",
        "describes the rows of a catch-up pass",
        "catch-up rows cannot be described to the attention backend",
    ),
    *rows(
        "vllm.v1.worker.utils",
        "AttentionGroup",
        "layer_names build_metadata",
        "makes the backend's own metadata for a catch-up pass",
        "catch-up rows cannot be described to the attention backend",
    ),
    *rows(
        "vllm.forward_context",
        "ForwardContext",
        "attn_metadata slot_mapping cudagraph_runtime_mode",
        "what a catch-up pass replaces and a step puts back",
        "catch-up would read and write the wrong slots",
    ),
    # Model Runner V1.
    *rows(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner",
        "_model_forward",
        "overridden to hand each request's draw and frontier to the model",
        "no exits on Model Runner V1",
    ),
    *rows(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner",
        "_update_states",
        "overridden to see requests come and go",
        "no exits on Model Runner V1",
    ),
    *rows(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner",
        "execute_model",
        "overridden to bracket one step",
        "no exits on Model Runner V1",
    ),
    *rows(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner",
        "load_model initialize_kv_cache get_model input_batch attn_groups query_start_loc "
        "discard_request_mask sample_tokens",
        "the step's requests, blocks and layers are read from it",
        "no exits on Model Runner V1",
    ),
    *rows(
        "vllm.v1.worker.gpu_input_batch",
        "InputBatch",
        "req_ids num_reqs block_table num_computed_tokens_cpu num_prompt_tokens_cpu_tensor "
        "generators",
        "where every request of the step stands",
        "no exits on Model Runner V1",
    ),
    *rows(
        "vllm.v1.worker.block_table",
        "BlockTable",
        "block_size slot_mapping get_numpy_array get_device_tensor",
        "the slots of waiting positions",
        "no exits on Model Runner V1",
    ),
    *rows(
        "vllm.v1.core.sched.output",
        "SchedulerOutput",
        "finished_req_ids scheduled_new_reqs scheduled_cached_reqs",
        "requests that come, go or were preempted",
        "requests cannot be followed",
    ),
    *rows(
        "vllm.v1.core.sched.output",
        "NewRequestData",
        "req_id sampling_params",
        "a new request's id and options",
        "requests cannot be followed",
    ),
    *rows(
        "vllm.v1.core.sched.output",
        "CachedRequestData",
        "resumed_req_ids",
        "requests whose blocks were taken away",
        "positions would be taken for complete that are not",
    ),
    *rows(
        "vllm.v1.worker.cpu_worker",
        "CPUWorker",
        "init_device",
        "overridden to build that runner",
        "no N-vium on CPU",
    ),
    *rows(
        "vllm.v1.worker.gpu_worker",
        "Worker",
        "_make_model_runner",
        "overridden to build the GPU runner",
        "no N-vium on GPUs with Model Runner V1",
    ),
    # Requests, of both methods.
    *rows(
        "vllm.entrypoints.openai.responses.serving",
        "OpenAIServingResponses",
        "_generate_with_builtin_tools",
        "wrapped to check per-request overrides before a streamed response has begun",
        "a bad override of a streamed response would be answered with 200 and an error event",
    ),
    *rows(
        "vllm.entrypoints.openai.completion.protocol",
        "CompletionRequest",
        "to_beam_search_params",
        "wrapped to refuse a beam search with options of N-vium or of VIA-SD",
        "they are dropped without a word",
    ),
    *rows(
        "vllm.entrypoints.openai.chat_completion.protocol",
        "ChatCompletionRequest",
        "to_beam_search_params",
        "wrapped to refuse a beam search with options of N-vium or of VIA-SD",
        "they are dropped without a word",
    ),
    *rows(
        "vllm.entrypoints.speech_to_text.transcription.protocol",
        "TranscriptionRequest",
        "to_beam_search_params",
        "wrapped to refuse a beam search with options of N-vium or of VIA-SD",
        "they are dropped without a word",
    ),
    *rows(
        "vllm.entrypoints.speech_to_text.translation.protocol",
        "TranslationRequest",
        "to_beam_search_params",
        "wrapped to refuse a beam search with options of N-vium or of VIA-SD",
        "they are dropped without a word",
    ),
    *rows(
        "vllm.v1.worker.cpu_model_runner",
        "CPUModelRunner",
        "initialize_kv_cache load_model",
        "overridden: what a method makes once there are a model and a cache",
        "neither method starts on CPU",
    ),
)
