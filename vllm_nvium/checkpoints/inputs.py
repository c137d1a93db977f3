# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that training and evaluation are given: what they are, and whether a model, its
parent and their tokenizers belong together. Looks at configurations and headers only, before any
weights are loaded.
"""

from pathlib import Path
from typing import Any

from vllm_nvium.errors import UserError, first_line

# Letters, digits, spaces, accents, code and emoji: what tokenizers differ in, whatever the text is.
TOKENIZER_SAMPLE = (
    "The quick brown fox jumps over 13 lazy dogs, doesn't it?\n"
    "\tdef f(x): return x ** 2  # 3.14159\n"
    "Größe, naïve façade, 東京, привет 🙂"
)


def open_model(folder: Path) -> Any:
    """The configuration of an N-vium checkpoint whose weight files hold what it asks for.

    Raises:
        UserError: the folder is no such checkpoint.
    """
    from vllm_nvium.model_executor.models.checkpoint_layout import check_files, indexed_files
    from vllm_nvium.model_executor.models.configuration_nvium import NviumConfig

    if not (folder / "config.json").is_file():
        raise UserError(
            f"MODEL is {str(folder)!r}, and an N-vium checkpoint folder (with a config.json) is "
            "needed."
        )
    config = load_config(str(folder), "MODEL")
    if not isinstance(config, NviumConfig):
        raise UserError(
            f"MODEL is {str(folder)!r}, whose model_type is {config.model_type!r}, and an N-vium "
            "checkpoint is needed (`vllm-nvium convert` makes one of a dense model)."
        )
    files = indexed_files(folder) or [folder / "model.safetensors"]
    if not files[0].is_file():
        raise UserError(
            f"MODEL is {str(folder)!r}, which has no model.safetensors; a whole N-vium "
            "checkpoint is needed."
        )
    # transformers would fill in what is missing with random numbers.
    check_files(config, files)
    return config


def open_parent(name: str) -> Any:
    """The configuration of a dense model of a family that N-vium models are made from.

    Raises:
        UserError: it cannot be read, or is another kind of model.
    """
    from vllm_nvium.model_executor.models.families import FAMILIES

    config = load_config(name, "--dense")
    if config.model_type not in FAMILIES:
        raise UserError(
            f"--dense is {name!r}, whose model_type is {config.model_type!r}, and a dense model "
            f"({', '.join(FAMILIES)}) is needed."
        )
    return config


def load_config(name: str, flag: str) -> Any:
    """A model's configuration.

    Raises:
        UserError: transformers cannot read it.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name)
    except (ValueError, OSError, KeyError, TypeError, StrictDataclassError) as error:
        raise UserError(
            f"{flag} is {name!r}, whose configuration transformers cannot read "
            f"({first_line(error)})."
        ) from error


def check_parent(dense: str, config: Any, parent: Any, block_size: int) -> None:
    """Refuses a parent that cannot be the one of an N-vium model, by their configurations.

    Args:
        dense: what --dense is.

    Raises:
        UserError: another vocabulary, or fewer positions than a block has.
    """
    if parent.vocab_size != config.vocab_size:
        raise UserError(
            f"--dense is {dense!r} with a vocabulary of {parent.vocab_size}, and MODEL has "
            f"{config.vocab_size}; the dense parent or twin of MODEL is needed."
        )
    check_block_size(block_size, parent.max_position_embeddings, "--dense")


def check_block_size(block_size: int, positions: int, whose: str) -> None:
    """Refuses blocks that are longer than a model can read.

    Raises:
        UserError: they are.
    """
    if block_size > positions:
        raise UserError(
            f"--block-size is {block_size}, and {whose} has max_position_embeddings = {positions}, "
            "which it must not exceed."
        )


def load_tokenizer(name: str, flag: str) -> Any:
    """A model's tokenizer.

    Raises:
        UserError: transformers cannot read it.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (ValueError, OSError, KeyError, TypeError, ImportError) as error:
        raise UserError(
            f"{flag} is {name!r}, whose tokenizer cannot be read ({first_line(error)})."
        ) from error


def check_tokenizers_agree(dense: str, tokenizer: Any, sample: str = TOKENIZER_SAMPLE) -> None:
    """Refuses a parent to whose tokenizer the same text is another.

    Raises:
        UserError: it is.
    """
    other = load_tokenizer(dense, "--dense")
    mine = tokenizer.encode(sample, add_special_tokens=False)
    if mine != other.encode(sample, add_special_tokens=False):
        raise UserError(
            f"--dense is {dense!r}, whose tokenizer gives other tokens than MODEL's for "
            "the same text; the dense parent or twin of MODEL is needed."
        )


def load_model(name: str, flag: str, dtype: str, **how: Any) -> Any:
    """A causal language model with all of its weights, in evaluation mode, on the GPU if there is
    one.

    Args:
        dtype: a name of PyTorch's, as `--dtype` takes it.
        how: more arguments of `from_pretrained`.

    Raises:
        UserError: the weights cannot be loaded, or one of them is missing.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            name, dtype=getattr(torch, dtype), output_loading_info=True, **how
        )
        model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{flag} is {name!r}, which does not fit into memory in --dtype {dtype}: use --dtype "
            "bfloat16, or leave CUDA_VISIBLE_DEVICES empty."
        ) from error
    except (
        ValueError, OSError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError
    ) as error:  # fmt: skip
        raise UserError(
            f"{flag} is {name!r}, whose weights cannot be loaded ({first_line(error)})."
        ) from error
    if missing := sorted(found["missing_keys"]):
        raise UserError(
            f"{flag} is {name!r}, which has no tensor {missing[0]}, and a whole checkpoint is "
            "needed."
        )
    return model
