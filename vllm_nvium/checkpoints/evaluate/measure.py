# SPDX-License-Identifier: Apache-2.0
"""Passes over a text: what an N-vium model is worth on it (perplexity of the mixture and of every
head, which exits its tokens leave at, the speed-up to expect from that), and the same of a dense
model. A block of T tokens predicts T - 1 of them. Notation as in `formulas.py`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from vllm_nvium.checkpoints.evaluate.formulas import (
    backbone_bytes,
    exit_bytes,
    expected_bytes,
    greedy_exits,
    greedy_shares,
    sampled_shares,
    top_tokens,
)
from vllm_nvium.checkpoints.evaluate.results import DenseEvaluation, Evaluation, ExitUse
from vllm_nvium.checkpoints.train.loss import (
    CHUNK,
    head_target_log_probs,
    mixture_target_log_probs,
    next_tokens,
    unembedding_of,
)
from vllm_nvium.console import Progress
from vllm_nvium.errors import UserError
from vllm_nvium.model_executor.models.parent import logits_cap
from vllm_nvium.model_executor.ops.mixture import expected_depth

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from vllm_nvium.model_executor.models.configuration_nvium import NviumConfig
    from vllm_nvium.model_executor.models.nvium_reference import NviumForCausalLM


@torch.no_grad()
def evaluate_nvium(
    model: "NviumForCausalLM",
    blocks: "Dataset | torch.Tensor",
    batch_size: int = 1,
    *,
    parent_top: torch.Tensor | None = None,
    chunk: int = CHUNK,
    progress: Progress | None = None,
) -> Evaluation:
    """Run an N-vium model over blocks of tokens.

    Every block is scored from its first token on, without what stands before it. Modules are left
    in the mode (training or evaluation) they were in, and no gradients are recorded.

    Args:
        model: on the device where it is to run.
        blocks: `[blocks, T]` int64, or a dataset whose column `input_ids` holds that.
        batch_size: blocks per forward pass.
        parent_top: `[blocks, T - 1]`, a dense parent's most likely tokens (`DenseEvaluation.top`),
            to compare every head's with; costs as much as the unembeddings once more.
        chunk: positions whose logits are held at a time.
        progress: told of every finished block.

    Raises:
        UserError: there is no block.
    """
    parts = []
    with _evaluating(model):
        constant, identity = _skipped(model)
        for rows, input_ids in _batches(blocks, batch_size, model.device):
            top = None if parent_top is None else parent_top[rows]
            parts.append(_block_values(model, input_ids, top, chunk))
            if progress is not None:
                progress.update(len(input_ids))
    by_block = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    # Blocks are equally long, so a mean over blocks is the mean over tokens.
    means = {name: values.mean(dim=0) for name, values in by_block.items()}
    itemsize = next(model.parameters()).element_size()
    bytes_per_exit = exit_bytes(model.config, constant, identity, itemsize)
    return Evaluation(
        exit_layers=tuple(model.config.exit_layers),
        num_layers=model.config.num_hidden_layers,
        tokens=_predicted(blocks),
        loss=float(means["loss"]),
        head_losses=tuple(means["heads"].tolist()),
        greedy_loss=float(means["greedy loss"]),
        block_losses=tuple(by_block["loss"].tolist()),
        sampled=_exit_use(means["sampled"], model.config, bytes_per_exit, itemsize),
        greedy=_exit_use(means["greedy"], model.config, bytes_per_exit, itemsize),
        exit_bytes=tuple(bytes_per_exit),
        agreement=None if parent_top is None else tuple(means["agreement"].tolist()),
        greedy_agreement=None if parent_top is None else float(means["greedy agreement"]),
    )


@torch.no_grad()
def evaluate_dense(
    model: "PreTrainedModel",
    blocks: "Dataset | torch.Tensor",
    batch_size: int = 1,
    *,
    keep_top: bool = False,
    chunk: int = CHUNK,
    progress: Progress | None = None,
) -> DenseEvaluation:
    """Run a dense model over blocks of tokens; see `evaluate_nvium`.

    Args:
        model: a causal language model of transformers whose logits are its unembedding applied to
            the last hidden state (a family of N-vium models), on the device where it is to run.
        keep_top: also keep the most likely token at every position.

    Raises:
        UserError: there is no block.
    """
    losses, top = [], []
    unembedding = model.get_output_embeddings().weight
    with _evaluating(model):
        for _, input_ids in _batches(blocks, batch_size, model.device):
            hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
            cap = logits_cap(model.config)
            log_probs = head_target_log_probs(
                hidden, unembedding, next_tokens(input_ids), chunk, cap
            )
            losses.append(-log_probs[:, :-1].double().mean(dim=1).cpu())
            if keep_top:
                top.append(top_tokens(hidden[:, :-1], unembedding, chunk).cpu())
            if progress is not None:
                progress.update(len(input_ids))
    block_losses = torch.cat(losses)
    return DenseEvaluation(
        tokens=_predicted(blocks),
        loss=float(block_losses.mean()),
        block_losses=tuple(block_losses.tolist()),
        bytes_per_token=_dense_bytes(model),
        top=torch.cat(top) if keep_top else None,
    )


def _block_values(
    model: "NviumForCausalLM",
    input_ids: torch.Tensor,
    parent_top: torch.Tensor | None,
    chunk: int,
) -> dict[str, torch.Tensor]:
    """One forward pass: means over the tokens of each block, float64 on the CPU.

    Returns:
        loss, greedy loss, greedy agreement `[B]`; heads, sampled, greedy, agreement `[B, N]`.
    """
    output = model(input_ids=input_ids, use_cache=False, compute_logits=False)
    mixture, heads = mixture_target_log_probs(model, output, next_tokens(input_ids), chunk)
    # The last position of a block has no next token in it.
    mixture, heads, margins = mixture[:, :-1], heads[:, :-1], output.margins[:, :-1]
    greedy_margin = model.config.greedy_margin
    exits = greedy_exits(margins, greedy_margin).unsqueeze(-1)  # [B, T-1, 1]
    values = {
        "loss": -mixture.double().mean(dim=1),
        "heads": -heads.double().mean(dim=1),
        "greedy loss": -heads.gather(-1, exits).double().mean(dim=(1, 2)),
        "sampled": sampled_shares(output.exit_log_weights[:, :-1]),
        "greedy": greedy_shares(margins, greedy_margin),
    }
    if parent_top is not None:
        hits = _agreement(model, output.head_hidden[:, :-1], parent_top, chunk)
        values["agreement"] = hits.double().mean(dim=1)
        values["greedy agreement"] = hits.gather(-1, exits).double().mean(dim=(1, 2))
    return {name: value.cpu() for name, value in values.items()}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; every module gets its own mode back, because a frozen part
    of a model in training may be in evaluation mode already."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _batches(
    blocks: "Dataset | torch.Tensor", batch_size: int, device: torch.device
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Slices of block numbers and their `[B, T]` tokens."""
    if len(blocks) == 0:
        raise UserError("The text has no whole block, so more text or shorter blocks are needed.")
    for start in range(0, len(blocks), batch_size):
        rows = slice(start, min(start + batch_size, len(blocks)))
        some = blocks[rows] if isinstance(blocks, torch.Tensor) else blocks[rows]["input_ids"]
        yield rows, torch.as_tensor(some).to(device)


def _predicted(blocks: "Dataset | torch.Tensor") -> int:
    first = blocks[0] if isinstance(blocks, torch.Tensor) else blocks[0]["input_ids"]
    return len(blocks) * (len(first) - 1)


def _skipped(model: "NviumForCausalLM") -> tuple[list[bool], list[bool]]:
    """Which routers are constant `[N-1]` and which adapters the identity `[N]`, as vLLM's model
    sees it when it loads these weights."""
    adapters = [exit.adapter for exit in model.exits] + [model.final_adapter]
    return (
        [not bool(exit.router.head.weight.any()) for exit in model.exits],
        [adapter is None or not bool(adapter.fc2.weight.any()) for adapter in adapters],
    )


def _agreement(
    model: "NviumForCausalLM", head_hidden: torch.Tensor, parent_top: torch.Tensor, chunk: int
) -> torch.Tensor:
    """`[B, T, N, H]` head inputs -> `[B, T, N]` bool: a head's top token is the parent's."""
    parent_top = parent_top.to(head_hidden.device)
    hits = [
        top_tokens(head_hidden[..., k, :], unembedding_of(model, k), chunk) == parent_top
        for k in range(head_hidden.shape[-2])
    ]
    return torch.stack(hits, dim=-1)


def _exit_use(
    shares: torch.Tensor, config: "NviumConfig", bytes_per_exit: Sequence[int], itemsize: int
) -> ExitUse:
    read = expected_bytes(shares, bytes_per_exit)
    depth = expected_depth(shares.log(), config.exit_layers, config.num_hidden_layers)
    return ExitUse(
        shares=tuple(shares.tolist()),
        mean_depth=float(depth),
        bytes_per_token=read,
        expected_speedup=backbone_bytes(config, itemsize) / read,
    )


def _dense_bytes(model: "PreTrainedModel") -> int:
    """All layers, the norm and the unembedding; of the embeddings one row is read."""
    weights = sum(parameter.numel() for parameter in model.base_model.parameters())
    weights -= model.get_input_embeddings().weight.numel()
    weights += model.get_output_embeddings().weight.numel()
    return weights * next(model.parameters()).element_size()
