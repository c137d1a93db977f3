# SPDX-License-Identifier: Apache-2.0
"""From the names of a checkpoint, its dense parent and texts to a report. One model is in memory at
a time.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_nvium.checkpoints.evaluate.measure import evaluate_dense, evaluate_nvium
from vllm_nvium.checkpoints.evaluate.results import (
    Comparison,
    DenseEvaluation,
    Evaluation,
    compare,
)
from vllm_nvium.checkpoints.inputs import (
    check_block_size,
    check_parent,
    check_tokenizers_agree,
    load_model,
    load_tokenizer,
    open_model,
    open_parent,
)
from vllm_nvium.checkpoints.text import check_tokenizer, load_blocks
from vllm_nvium.console import progress

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Request:
    """What to evaluate, and how.

    Attributes:
        texts: name -> sources, as `load_blocks` takes them.
        dense: folder or hub id of the dense parent.
        agreement: also compare the most likely token of every head with the parent's.
        max_tokens: of each text.
        dtype: of both models, a name of PyTorch's.
    """

    model: Path
    texts: dict[str, list[str]]
    dense: str | None = None
    agreement: bool = False
    block_size: int = 1024
    max_tokens: int | None = None
    batch_size: int = 1
    dtype: str = "float32"
    text_field: str | None = None
    split: str = "train"


@dataclass(frozen=True)
class TextResult:
    """Both models on one text; `dense` and `comparison` are `None` without a parent."""

    nvium: Evaluation
    dense: DenseEvaluation | None = None
    comparison: Comparison | None = None


@dataclass(frozen=True)
class Report:
    """Everything measured, by the name of the text, and on what device."""

    request: Request
    results: dict[str, TextResult]
    device: str

    def to_json(self) -> dict[str, Any]:
        """Every number, and what it was measured with."""
        import torch
        import transformers

        from vllm_nvium.version import __version__

        settings = ("dense", "dtype", "block_size", "batch_size", "max_tokens")
        return {
            "model": str(self.request.model),
            **{name: getattr(self.request, name) for name in settings},
            "device": self.device,
            "texts": {
                name: {
                    "sources": self.request.texts[name],
                    "nvium": result.nvium.to_json(),
                    "dense": result.dense and result.dense.to_json(),
                    "comparison": result.comparison and result.comparison.to_json(),
                }
                for name, result in self.results.items()
            },
            "versions": {
                "vllm_nvium": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }


def evaluate_checkpoint(request: Request) -> Report:
    """Load texts and models, and evaluate them; see `evaluate` of this package."""
    texts = _open_texts(request)
    dense: dict[str, DenseEvaluation] = {}
    if request.dense is not None:
        parent = load_model(request.dense, "--dense", request.dtype)
        for name, text in texts.items():
            with progress(f"Dense parent on {name}", len(text), "block") as bar:
                dense[name] = evaluate_dense(
                    parent, text, request.batch_size, keep_top=request.agreement, progress=bar
                )
        del parent  # one model in memory at a time
    model = load_model(str(request.model), "MODEL", request.dtype)
    results = {}
    for name, text in texts.items():
        top = dense[name].top if dense else None
        with progress(f"N-vium on {name}", len(text), "block") as bar:
            found = evaluate_nvium(model, text, request.batch_size, parent_top=top, progress=bar)
        results[name] = (
            TextResult(found, dense[name], compare(found, dense[name]))
            if dense
            else TextResult(found)
        )
    return Report(request, results, model.device.type)


def _open_texts(request: Request) -> "dict[str, Dataset]":
    """The blocks of every text, after all that can be checked without weights."""
    from vllm_nvium.model_executor.models.nvium_reference import register_with_transformers

    register_with_transformers()
    config = open_model(request.model)
    check_block_size(request.block_size, config.max_position_embeddings, "MODEL")
    if request.dense is not None:
        check_parent(request.dense, config, open_parent(request.dense), request.block_size)
    tokenizer = load_tokenizer(str(request.model), "MODEL")
    check_tokenizer(tokenizer, config.vocab_size)
    if request.dense is not None:
        check_tokenizers_agree(request.dense, tokenizer)
    texts = {
        name: load_blocks(
            sources,
            tokenizer,
            request.block_size,
            max_tokens=request.max_tokens,
            text_field=request.text_field,
            split=request.split,
        )
        for name, sources in request.texts.items()
    }
    if request.dense is not None:
        some = tokenizer.decode(next(iter(texts.values()))[0]["input_ids"])
        check_tokenizers_agree(request.dense, tokenizer, some)
    return texts
