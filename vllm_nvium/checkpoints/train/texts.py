# SPDX-License-Identifier: Apache-2.0
"""The text of a run: what it is trained on, and what it is measured on."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_nvium.checkpoints.text import load_blocks
from vllm_nvium.checkpoints.train.distill import self_distill
from vllm_nvium.checkpoints.train.folder import SELF_DISTILLED
from vllm_nvium.checkpoints.train.options import TrainOptions
from vllm_nvium.checkpoints.train.retrofit import Start
from vllm_nvium.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset


def training_blocks(options: TrainOptions, start: Start, out: Path) -> "Dataset":
    """Blocks of `--text` and of what the dense parent samples.

    Raises:
        UserError: a text cannot be used, or there is no parent to sample from.
    """
    texts = list(options.text)
    if options.self_distill:
        texts.append(str(_self_distilled(options, start, out)))
    return load_blocks(
        texts,
        start.tokenizer,
        options.block_size,
        max_tokens=options.max_text_tokens or None,
        seed=options.seed,
        # Where one sampled text ends unfinished, what follows says nothing about it.
        labels=True,
    )


def validation_blocks(options: TrainOptions, tokenizer: Any, tokens: int) -> dict[str, "Dataset"]:
    """Blocks of every validation text, by its name on the command line.

    Args:
        tokens: in all texts together.

    Raises:
        UserError: a text cannot be used.
    """
    share = max(options.block_size, tokens // len(options.validation))
    return {
        source: load_blocks(
            [source],
            tokenizer,
            options.block_size,
            max_tokens=share,
            seed=0,  # another seed trains on other text, but is measured on the same
            labels=True,
        )
        for source in options.validation
    }


def _self_distilled(options: TrainOptions, start: Start, out: Path) -> Path:
    parent = options.model if start.has_parent else options.dense
    if not parent:
        raise UserError(
            f"--self-distill samples from a dense parent, and {options.model} is not dense: give "
            "the parent with --dense."
        )
    return self_distill(
        parent,
        out / SELF_DISTILLED,
        options.self_distill,
        prompt_files=options.prompts,
        seed=options.seed,
        replicas=options.distill_replicas,
    )
