# SPDX-License-Identifier: Apache-2.0
"""Models in a GGUF file, dequantised by transformers."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.core_model_loading import revert_weight_conversion

from vllm_nvium.checkpoints.convert.checkpoint import Source
from vllm_nvium.errors import UserError, first_line
from vllm_nvium.files import staged_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def open_gguf(path: Path, dtype: str) -> Source:
    """Open a GGUF file to convert from; the source's tensors are its state dict.

    Args:
        dtype: `"float32"`, or anything else for bfloat16: quantised weights have no dtype of
            their own.

    Raises:
        UserError: the optional packages are missing, or transformers cannot read the file.
    """
    model, tokenizer = _load(path, torch.float32 if dtype == "float32" else torch.bfloat16)
    state = revert_weight_conversion(model, model.state_dict())  # names as in a folder

    def copy_companions(out: Path) -> None:
        tokenizer.save_pretrained(out)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(out)

    config = model.config.to_dict()
    config.pop("quantization_config", None)  # describes the file, not the dequantised weights
    return Source(
        name=str(path),
        config=config,
        shapes={name: tuple(tensor.shape) for name, tensor in state.items()},
        load=state.__getitem__,
        copy_companions=copy_companions,
        load_config=lambda: model.config,
        path=path,
    )


def dequantise(path: Path, out: Path) -> None:
    """Write a GGUF file's model and tokenizer as a bfloat16 Hugging Face folder, which is there as
    a whole or not at all.
    """
    model, tokenizer = _load(path, torch.bfloat16)
    size = sum(parameter.nbytes for parameter in model.parameters())
    with staged_folder(out, force=True, size=size, sources=[path]) as folder:
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)


def _load(path: Path, dtype: torch.dtype) -> "tuple[PreTrainedModel, Any]":
    try:
        import accelerate  # noqa: F401
        import gguf  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"reading GGUF needs the package {error.name!r}: pip install gguf accelerate."
        ) from error
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=dtype,
            # Without it the weights stay packed, and packed weights cannot be saved.
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # noqa: BLE001 - its readers raise whatever the content trips over
        raise UserError(f"transformers cannot read {path}: {first_line(error)}") from error
    return model, tokenizer
