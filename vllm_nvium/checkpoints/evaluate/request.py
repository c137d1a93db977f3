# SPDX-License-Identifier: Apache-2.0
"""What an evaluation is asked for, apart from what evaluates, so that a command's help need not
import torch."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from vllm_nvium.checkpoints.options import Options, option


class Request(Options):
    """What to evaluate, and how; `texts` is name -> sources, as `load_blocks` takes them."""

    model: Path = option(..., "N-vium checkpoint folder")
    texts: dict[str, list[str]] = option(..., "")
    dense: str | None = option(
        None, "dense model to compare with: a Hugging Face folder or a hub id", "PARENT"
    )
    agreement: bool = option(
        False,
        "with --dense: also how often each head's most likely token is the parent's; costs all "
        "unembeddings once more",
    )
    block_size: int = option(1024, "tokens that are read together", "T", ge=2)
    max_tokens: Annotated[int, Field(ge=1)] | None = option(
        None, "of each text (default: all)", "N"
    )
    batch_size: int = option(1, "blocks of a pass", "B", ge=1)
    dtype: Literal["float32", "bfloat16"] = option("float32", "of both models")
    text_field: str | None = option(None, "field of JSON lines and data sets", "FIELD")
    split: str = option("train", "of data sets that are not given as NAME:CONFIG:SPLIT")
