# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that training and evaluation are given: what they are, and whether a model, its
parent and their tokenizers belong together. Looks at configurations and headers only, before any
weights are loaded.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_nvium.errors import UserError, first_line

# Letters, digits, spaces, accents, code and emoji: what tokenizers differ in, whatever the text is.
TOKENIZER_SAMPLE = (
    "The quick brown fox jumps over 13 lazy dogs, doesn't it?\n"
    "\tdef f(x): return x ** 2  # 3.14159\n"
    "Größe, naïve façade, 東京, привет 🙂"
)


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """What libraries raise about a file inside the block is told in one sentence that begins with
    `what`."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    others = (KeyError, TypeError, RuntimeError, ImportError)
    try:
        yield
    except (ValueError, OSError, *others, StrictDataclassError, SafetensorError) as error:
        raise UserError(f"{what} ({first_line(error)}).") from error


def open_model(folder: Path) -> Any:
    """The configuration of an N-vium checkpoint whose weight files hold what it asks for; refuses
    any other folder."""
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
    """The configuration of a dense model of a family that N-vium models are made from; refuses
    others."""
    from vllm_nvium.model_executor.models.families import FAMILIES

    config = load_config(name, "--dense")
    if config.model_type not in FAMILIES:
        raise UserError(
            f"--dense is {name!r}, whose model_type is {config.model_type!r}, and a dense model "
            f"({', '.join(FAMILIES)}) is needed."
        )
    return config


def load_config(name: str, flag: str) -> Any:
    """A model's configuration; refuses one that transformers cannot read."""
    from transformers import AutoConfig

    with refusing(f"{flag} is {name!r}, whose configuration transformers cannot read"):
        return AutoConfig.from_pretrained(name)


def check_parent(dense: str, config: Any, parent: Any, block_size: int) -> None:
    """Refuses a parent, what --dense is, that cannot be the one of an N-vium model, by their
    configurations."""
    if parent.vocab_size != config.vocab_size:
        raise UserError(
            f"--dense is {dense!r} with a vocabulary of {parent.vocab_size}, and MODEL has "
            f"{config.vocab_size}; the dense parent or twin of MODEL is needed."
        )
    check_block_size(block_size, parent.max_position_embeddings, "--dense")


def check_block_size(block_size: int, positions: int, whose: str) -> None:
    """Refuses blocks that are longer than a model can read."""
    if block_size > positions:
        raise UserError(
            f"--block-size is {block_size}, and {whose} has max_position_embeddings = {positions}, "
            "which it must not exceed."
        )


def load_tokenizer(name: str, flag: str) -> Any:
    """A model's tokenizer; refuses one that transformers cannot read."""
    from transformers import AutoTokenizer

    with refusing(f"{flag} is {name!r}, whose tokenizer cannot be read"):
        return AutoTokenizer.from_pretrained(name)


def check_tokenizers_agree(dense: str, tokenizer: Any, sample: str = TOKENIZER_SAMPLE) -> None:
    """Refuses a parent to whose tokenizer the same text is another."""
    other = load_tokenizer(dense, "--dense")
    mine = tokenizer.encode(sample, add_special_tokens=False)
    if mine != other.encode(sample, add_special_tokens=False):
        raise UserError(
            f"--dense is {dense!r}, whose tokenizer gives other tokens than MODEL's for "
            "the same text; the dense parent or twin of MODEL is needed."
        )


def attention_for(config: Any) -> dict[str, str]:
    """The argument of transformers that makes a model apply the cap on its attention logits (Gemma
    2), as vLLM does: other kinds of attention leave it out."""
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    return {"attn_implementation": "eager"} if capped else {}


def load_model(name: str, flag: str, dtype: str) -> Any:
    """A causal language model with all of its weights, in evaluation mode, on the GPU if there is
    one; refuses one whose weights cannot be loaded, or are not all there.

    Args:
        dtype: a name of PyTorch's, as `--dtype` takes it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    attention = attention_for(load_config(name, flag))
    try:
        with refusing(f"{flag} is {name!r}, whose weights cannot be loaded"):
            model, found = AutoModelForCausalLM.from_pretrained(
                name, dtype=getattr(torch, dtype), output_loading_info=True, **attention
            )
            model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    except UserError as error:
        if not isinstance(error.__cause__, torch.OutOfMemoryError):
            raise
        raise UserError(
            f"{flag} is {name!r}, which does not fit into memory in --dtype {dtype}: use --dtype "
            "bfloat16, or leave CUDA_VISIBLE_DEVICES empty."
        ) from error
    if missing := sorted(found["missing_keys"]):
        raise UserError(
            f"{flag} is {name!r}, which has no tensor {missing[0]}, and a whole checkpoint is "
            "needed."
        )
    return model
