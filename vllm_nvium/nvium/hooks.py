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
)
