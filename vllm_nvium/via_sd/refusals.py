# SPDX-License-Identifier: Apache-2.0
"""What a start with `--via-sd` is refused for: options beside it, kinds of targets and drafters."""

from typing import Any

from vllm_nvium.engine.unsupported import (
    Unsupported,
    above_one,
    first_set,
    pooling_runner,
    rust_frontend,
    watermark,
)
from vllm_nvium.errors import UserError

# Targets whose inner model is a loop over a plain list of layers, and whose layers take and return
# (hidden, residual): `forward` of the class itself runs on any part of the list.
ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "MiMoForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
)
# Drafters whose count of tokens is a number that vLLM takes per call.
METHODS = ("ngram", "suffix", "draft_model", "eagle", "eagle3", "mtp")


def _prefetched_layers(offload: Any) -> int | None:
    """`--offload-group-size`, where that way of offloading is in use."""
    if offload.offload_backend == "uva":
        return None
    return offload.prefetch.offload_group_size or None


def _without_rollback(given: Any) -> str | None:
    """The backend of structured outputs, where it never goes back."""
    backend = given.get("backend") if isinstance(given, dict) else given.backend
    return f"one with backend {backend}" if backend == "lm-format-enforcer" else None


UNSUPPORTED: tuple[Unsupported, ...] = (
    Unsupported(
        "--pipeline-parallel-size",
        lambda c: above_one(c.parallel_config.pipeline_parallel_size),
        "the slim verifier of VIA-SD needs all layers in one process",
        "set it to 1",
    ),
    Unsupported(
        "--decode-context-parallel-size",
        lambda c: above_one(c.parallel_config.decode_context_parallel_size),
        "the slim verifier of VIA-SD needs the whole KV cache of a sequence in one place",
        "set it to 1",
    ),
    Unsupported(
        "--runner",
        pooling_runner,
        "a model that pools generates nothing that could be drafted",
        "use --runner generate, or remove --via-sd",
    ),
    Unsupported(
        "--kv-offloading-size",
        # Before the next row: vLLM has made a connector of it, which the user never named.
        lambda c: c.cache_config.kv_offloading_size,
        "a KV connector could move what the slim verifier wrote and nobody verified",
        "remove it",
    ),
    Unsupported(
        "--kv-transfer-config",
        lambda c: c.kv_transfer_config and c.kv_transfer_config.kv_connector,
        "a KV connector could move what the slim verifier wrote and nobody verified",
        "remove it",
    ),
    Unsupported(
        "--enable-lora",
        lambda c: True if c.lora_config is not None else None,
        "adapters are not applied to the passes of the slim verifier",
        "merge the adapter into the checkpoint and leave it off",
    ),
    Unsupported(
        "--offload-group-size",
        lambda c: _prefetched_layers(c.offload_config),
        "each offloaded layer fetches the next one's weights, and the slim verifier skips layers",
        "use --cpu-offload-gb instead",
    ),
    Unsupported(
        "--structured-outputs-config",
        lambda c: _without_rollback(c.structured_outputs_config),
        "it cannot take tokens back, and a window has tokens that may not stay",
        "use xgrammar, guidance or outlines",
    ),
    # What only Model Runner V2 has: with it vLLM would not go back to V1, or would refuse a runner
    # that the user never chose.
    Unsupported(
        "--prefill-context-parallel-size",
        lambda c: above_one(c.parallel_config.prefill_context_parallel_size),
        "VIA-SD runs on Model Runner V1, which has no context parallelism of prefills",
        "set it to 1",
    ),
    Unsupported(
        "--watermark-config",
        watermark,
        "VIA-SD runs on Model Runner V1, which draws without a watermark",
        "remove it",
    ),
    Unsupported(
        "--attention-config",
        lambda c: c.attention_config.hisparse_config and "one with hisparse_config",
        "VIA-SD runs on Model Runner V1, which has no HiSparse",
        "remove hisparse_config",
    ),
    Unsupported(
        "VLLM_USE_RUST_FRONTEND",
        rust_frontend,
        "that front end checks no per-request options and shows no metrics of VIA-SD",
        "unset it",
    ),
    Unsupported(
        "--async-scheduling",
        lambda c: True if c.scheduler_config.async_scheduling else None,
        "VIA-SD reads each step's tokens on the host",
        "leave it off",
    ),
)


def refuse_unsupported(config: Any) -> None:
    """Raise UserError for the first option in the table that is on.

    Args:
        config: a VllmConfig, or what has the same parts.
    """
    if (found := first_set(UNSUPPORTED, config)) is not None:
        row, value = found
        raise UserError(f"{row.flag} is {value}, but {row.why}; {row.remedy}.")


def check_drafter(spec: Any) -> None:
    """vLLM may have found out that a drafter is of another kind than its method said."""
    if spec.method not in METHODS:
        raise UserError(
            f"--speculative-config names {spec.model!r}, which is a drafter of method "
            f"{spec.method!r}, and VIA-SD works with {', '.join(METHODS)}."
        )
    check_rejection(spec.rejection_sample_method)
    if spec.parallel_drafting:
        raise UserError(
            f"--speculative-config names {spec.model!r} with parallel_drafting, whose drafts come "
            "in one fixed number, but VIA-SD chooses the number of drafts itself; name a drafter "
            "without it."
        )


def check_rejection(method: str) -> None:
    if method != "standard":
        raise UserError(
            f"--speculative-config has rejection_sample_method {method!r}, but VIA-SD "
            "decides about drafts itself; leave it out."
        )


def check_architecture(model_config: Any) -> None:
    found = model_config.architecture
    if found not in ARCHITECTURES:
        raise UserError(
            f"--via-sd is on, but {model_config.model} is a {found}, and the slim verifier works "
            f"on {', '.join(ARCHITECTURES)}; remove the flag."
        )


def check_graphs(vllm_config: Any) -> None:
    """Where vLLM is to capture graphs of whole windows, one of them has to be among the sizes: it
    says so in a worker, late, and of options that nobody gave. (With an attention backend that has
    no such graphs it would make piecewise ones instead, which can be asked for.)"""
    compilation, rows = vllm_config.compilation_config, 1 + vllm_config.num_speculative_tokens
    mode, largest = compilation.cudagraph_mode, compilation.max_cudagraph_capture_size
    if mode is None or mode.decode_mode().name != "FULL" or largest is None:
        return
    if not compilation.cudagraph_capture_sizes or largest >= rows:
        return
    flag = "--max-cudagraph-capture-size (or the largest of --cudagraph-capture-sizes)"
    if (tokens := vllm_config.scheduler_config.max_num_batched_tokens) < rows:
        flag, largest = "--max-num-batched-tokens", tokens
    raise UserError(
        f"{flag} is {largest}, but --via-sd-window {rows - 1} has graphs of {rows} tokens; give at "
        "least that, a smaller window, or cudagraph_mode PIECEWISE in --compilation-config."
    )
