# SPDX-License-Identifier: Apache-2.0
"""What a start of an N-vium model is refused for: options beside it that cannot work."""

from typing import TYPE_CHECKING, Any

from vllm_nvium.engine.feature import running
from vllm_nvium.engine.unsupported import (
    Unsupported,
    above_one,
    first_set,
    pooling_runner,
    rust_frontend,
    watermark,
)
from vllm_nvium.errors import UserError
from vllm_nvium.nvium import cuda_graphs

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def _experts_only(model_config: Any) -> bool:
    return model_config.quantization in ("experts_int8", "int8_per_channel_weight_only")


UNSUPPORTED: tuple[Unsupported, ...] = (
    Unsupported(
        "--pipeline-parallel-size",
        lambda c: above_one(c.parallel_config.pipeline_parallel_size),
        "an N-vium model decides between its layers how deep to go and needs them in one process",
        "set it to 1 and use --tensor-parallel-size",
    ),
    Unsupported(
        "--decode-context-parallel-size",
        lambda c: above_one(c.parallel_config.decode_context_parallel_size),
        "catch-up passes of N-vium need the whole KV cache of a sequence in one place",
        "set it to 1",
    ),
    Unsupported(
        "--prefill-context-parallel-size",
        lambda c: above_one(c.parallel_config.prefill_context_parallel_size),
        "catch-up passes of N-vium need all rows of a sequence in one place",
        "set it to 1",
    ),
    Unsupported(
        "--enable-dbo",
        lambda c: True if c.parallel_config.enable_dbo else None,
        "the two halves of a batch would leave an N-vium model at different depths",
        "leave it off",
    ),
    Unsupported(
        "--ubatch-size",
        lambda c: above_one(c.parallel_config.ubatch_size),
        "the parts of a batch would leave an N-vium model at different depths",
        "leave it at 0",
    ),
    Unsupported(
        "--no-disable-hybrid-kv-cache-manager",
        # None where neither form of the flag was given.
        lambda c: True if c.scheduler_config.disable_hybrid_kv_cache_manager is False else None,
        "N-vium needs the K/V of all layers in one block table, those behind a window included",
        "leave it out",
    ),
    Unsupported(
        "--kv-transfer-config",
        lambda c: c.kv_transfer_config and c.kv_transfer_config.kv_connector,
        "a KV connector would move blocks whose deferred positions are not complete",
        "remove it",
    ),
    Unsupported(
        "--kv-offloading-size",
        # vLLM turns this into a KV connector, but only after this check has run.
        lambda c: c.cache_config.kv_offloading_size,
        "a KV connector would move blocks whose deferred positions are not complete",
        "remove it",
    ),
    Unsupported(
        "--cpu-offload-gb",
        lambda c: c.offload_config.uva.cpu_offload_gb or None,
        "weights of an N-vium model have not been tried outside the device's memory",
        "leave it at 0",
    ),
    Unsupported(
        "--offload-group-size",
        lambda c: c.offload_config.prefetch.offload_group_size or None,
        "it fetches the weights of all layers in turn, and an N-vium model leaves some out",
        "leave it at 0",
    ),
    Unsupported(
        "--quantization",
        lambda c: c.model_config.quantization if _experts_only(c.model_config) else None,
        "it quantises experts only, which has not been tried with N-vium",
        "leave it out",
    ),
    Unsupported(
        "--data-parallel-size",
        lambda c: (
            above_one(c.parallel_config.data_parallel_size) if c.model_config.is_moe else None
        ),
        "engines exchange rows in every layer with experts, and an N-vium model leaves its rows at "
        "different depths",
        "set it to 1, or start a server for each",
    ),
    Unsupported(
        "--enable-return-routed-experts",
        lambda c: c.aux_output_config.enable_return_routed_experts or None,
        "vLLM takes the rows of a layer for those of its batch, and an N-vium model leaves rows "
        "out and runs others later",
        "leave it out",
    ),
    Unsupported(
        "--watermark-config",
        watermark,
        "an N-vium model draws its exits without a mark, and marked tokens have not been tried",
        "remove it",
    ),
    # Before the next: whoever removed the drafter would be told that --via-sd needs one.
    Unsupported(
        "--via-sd",
        lambda c: True if running(c, other_than="N-vium") else None,
        "an N-vium model leaves layers out by itself",
        "remove it",
    ),
    Unsupported(
        "--speculative-config",
        lambda c: c.speculative_config and c.speculative_config.method,
        "speculative decoding verifies drafts with a law that N-vium's exits do not follow",
        "remove it",
    ),
    Unsupported(
        "--enable-lora",
        lambda c: True if c.lora_config is not None else None,
        "adapters do not cover N-vium's exit heads and routers",
        "merge the adapter into the checkpoint and leave it off",
    ),
    Unsupported(
        "--enable-prompt-embeds",
        lambda c: True if c.model_config.enable_prompt_embeds else None,
        "N-vium starts its segments from token ids",
        "leave it off",
    ),
    Unsupported(
        "--kv-sharing-fast-prefill",
        lambda c: True if c.cache_config.kv_sharing_fast_prefill else None,
        "it skips prompt rows that N-vium's segments need",
        "leave it off",
    ),
    Unsupported(
        "--runner",
        pooling_runner,
        "N-vium models generate text and have no pooler",
        "use --runner generate",
    ),
    Unsupported(
        "VLLM_USE_RUST_FRONTEND",
        rust_frontend,
        "that front end does not check N-vium's per-request options",
        "unset it",
    ),
)


def refuse_unsupported(vllm_config: "VllmConfig") -> None:
    """Raise UserError for the first option in the table that is on."""
    found = first_set(UNSUPPORTED, vllm_config) or cuda_graphs.asked_for(vllm_config)
    if found is not None:
        option, value = found
        raise UserError(f"{option.flag} is {value!r}, but {option.why}; {option.remedy}.")
