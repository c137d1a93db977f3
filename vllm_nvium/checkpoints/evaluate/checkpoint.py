# SPDX-License-Identifier: Apache-2.0
"""From the names of a checkpoint, its dense parent and texts to a report. One model is in memory at
a time.
"""

import torch
import transformers

from vllm_nvium.checkpoints import require
from vllm_nvium.checkpoints.evaluate.measure import (
    dense_top_tokens,
    evaluate_dense,
    evaluate_nvium,
)
from vllm_nvium.checkpoints.evaluate.request import Request
from vllm_nvium.checkpoints.evaluate.results import (
    DenseEvaluation,
    Report,
    TextResult,
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
from vllm_nvium.version import __version__


def evaluate(request: Request) -> Report:
    """Evaluate an N-vium checkpoint on texts, beside its dense parent if one is given.

    Raises:
        UserError: a model or a text cannot be used; found before any weights are loaded, unless
            they are the reason.
    """
    require("datasets")
    texts, size = _open_texts(request), request.batch_size
    dense: dict[str, DenseEvaluation] = {}
    top: dict[str, torch.Tensor] = {}
    if request.dense is not None:
        parent = load_model(request.dense, "--dense", request.dtype)
        for name, text in texts.items():
            dense[name] = evaluate_dense(parent, text, size, title=f"Dense parent on {name}")
            if request.agreement:
                top[name] = dense_top_tokens(parent, text, size)
        del parent  # one model in memory at a time
    model = load_model(str(request.model), "MODEL", request.dtype)
    results = {}
    for name, text in texts.items():
        found = evaluate_nvium(
            model, text, size, parent_top=top.get(name), title=f"N-vium on {name}"
        )
        beside = (dense[name], compare(found, dense[name])) if dense else (None, None)
        results[name] = TextResult(request.texts[name], found, *beside)
    return Report(
        model=str(request.model),
        dense=request.dense,
        dtype=request.dtype,
        block_size=request.block_size,
        batch_size=size,
        max_tokens=request.max_tokens,
        device=model.device.type,
        texts=results,
        versions={
            "vllm_nvium": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    )


def _open_texts(request: Request) -> dict[str, torch.Tensor]:
    """The blocks of every text, `[blocks, T]` int64, after all that can be checked without
    weights."""
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
            vocab_size=config.vocab_size,
            max_tokens=request.max_tokens,
            text_field=request.text_field,
            split=request.split,
        )[:]["input_ids"]
        for name, sources in request.texts.items()
    }
    if request.dense is not None:
        some = tokenizer.decode(next(iter(texts.values()))[0])
        check_tokenizers_agree(request.dense, tokenizer, some)
    return texts
