# SPDX-License-Identifier: Apache-2.0
"""What a search for a mask reads: the target's configuration, the text, the target's weights."""

from typing import Any

import torch

from vllm_nvium.checkpoints.inputs import (
    check_block_size,
    load_config,
    load_model,
    load_tokenizer,
)
from vllm_nvium.checkpoints.mask_search.objectives import TeacherForcing, most_tokens
from vllm_nvium.checkpoints.mask_search.request import SearchRequest
from vllm_nvium.checkpoints.mask_search.search import Score
from vllm_nvium.checkpoints.mask_search.speed import WINDOW, SpeedRun, measure_speed
from vllm_nvium.checkpoints.text import check_tokenizer, load_blocks
from vllm_nvium.console import progress
from vllm_nvium.errors import UserError
from vllm_nvium.model_executor.models.nvium_reference import register_with_transformers

# Decoders whose layers are a plain list: each takes the hidden states of the one before and returns
# its own, so that one can be left out.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")


def load_target_config(request: SearchRequest) -> Any:
    """The target's configuration."""
    register_with_transformers()  # to refuse an N-vium model by its name
    config = load_config(request.target, "TARGET")
    if config.model_type == "nvium":
        raise UserError(
            f"TARGET is {request.target!r}, an N-vium model, which chooses its own depth for every "
            "token: give a dense model."
        )
    if config.model_type not in FAMILIES:
        raise UserError(
            f"TARGET is {request.target!r}, whose model_type is {config.model_type!r}, and masks "
            f"can be searched for {', '.join(FAMILIES)}."
        )
    positions = config.max_position_embeddings
    if request.objective == "speed" and request.block_size + WINDOW > positions:
        raise UserError(
            f"--block-size is {request.block_size}, and with a window of {WINDOW} tokens it must "
            f"not exceed TARGET's max_position_embeddings = {positions}."
        )
    if request.drafter is not None:
        _check_drafter(request.drafter, config.vocab_size)
    check_block_size(request.block_size, positions, "TARGET")
    return config


def _check_drafter(name: str, vocab_size: int) -> None:
    found = getattr(load_config(name, "--drafter"), "vocab_size", None)
    if found != vocab_size:
        raise UserError(
            f"--drafter is {name!r}, whose vocabulary has {found} tokens and TARGET's "
            f"{vocab_size}; give a draft model of the same vocabulary."
        )


def load_text(request: SearchRequest, config: Any) -> torch.Tensor:
    """The text as blocks of tokens, `[B, T]` int64."""
    most = most_tokens(config.vocab_size)
    if request.objective == "divergence" and request.tokens > most:
        raise UserError(
            f"--tokens is {request.tokens}, and the target's predictions over its "
            f"{config.vocab_size} tokens are kept in memory for at most {most}: give fewer, or use "
            "--objective agreement."
        )
    tokenizer = load_tokenizer(request.target, "TARGET")
    check_tokenizer(tokenizer, config.vocab_size)
    # Not --seed: another seed tries other masks on the same text.
    found = load_blocks(
        request.data,
        tokenizer,
        request.block_size,
        vocab_size=config.vocab_size,
        max_tokens=request.tokens,
        seed=0,
    )
    return found[:]["input_ids"]


def make_score(request: SearchRequest, blocks: torch.Tensor) -> Score:
    """The function that scores masks on the text."""
    if request.objective == "speed":
        half = request.block_size // 2
        run = SpeedRun(
            target=request.target,
            drafter=request.drafter,
            prompts=blocks[:, :half].tolist(),
            new_tokens=request.block_size - half,
            dtype=request.dtype,
        )
        return lambda skipped: measure_speed(run, skipped)
    model = load_model(request.target, "TARGET", request.dtype)
    with progress("Full model", 1, "pass") as bar:
        score = TeacherForcing(model, blocks, request.objective, request.alpha, request.beta)
        bar.update()
    return score
