# SPDX-License-Identifier: Apache-2.0
"""Passes over a text: what an N-vium model is worth on it (perplexity of the mixture and of every
head, which exits its tokens leave at, the speed-up to expect from that), and the same of a dense
model. A block of T tokens predicts T - 1 of them. Notation as in `formulas.py`.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from vllm_nvium.checkpoints.evaluate.formulas import (
    backbone_bytes,
    exit_bytes,
    expected_bytes,
    greedy_exits,
    greedy_shares,
    perplexity,
    sampled_shares,
    top_tokens,
)
from vllm_nvium.checkpoints.evaluate.results import DenseEvaluation, Evaluation, ExitUse
from vllm_nvium.checkpoints.train.loss import (
    dense_target_log_probs,
    mixture_target_log_probs,
    next_tokens,
    unembedding_of,
)
from vllm_nvium.console import progress
from vllm_nvium.errors import UserError
from vllm_nvium.model_executor.ops.mixture import expected_depth

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from vllm_nvium.model_executor.models.configuration_nvium import NviumConfig
    from vllm_nvium.model_executor.models.nvium_reference import NviumForCausalLM


@torch.no_grad()
def evaluate_nvium(
    model: "NviumForCausalLM",
    blocks: torch.Tensor,
    batch_size: int = 1,
    *,
    parent_top: torch.Tensor | None = None,
    title: str = "N-vium",
) -> Evaluation:
    """Run an N-vium model over blocks of tokens. Every block is scored from its first token on,
    without what stands before it.

    Args:
        model: in evaluation mode, on the device where it is to run.
        blocks: `[blocks, T]` int64.
        batch_size: blocks per forward pass.
        parent_top: `[blocks, T - 1]`, a dense parent's most likely tokens (of `dense_top_tokens`),
            to compare every head's with; costs as much as the unembeddings once more.
        title: of the progress bar.
    """
    parts = []
    for rows, input_ids in _batches(blocks, batch_size, model.device, title):
        top = None if parent_top is None else parent_top[rows]
        parts.append(_block_values(model, input_ids, top))
    by_block = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    # Blocks are equally long, so a mean over blocks is the mean over tokens.
    means = {name: values.mean(dim=0).tolist() for name, values in by_block.items()}
    itemsize = next(model.parameters()).element_size()
    bytes_per_exit = exit_bytes(model.config, *_skipped(model), itemsize)
    return Evaluation(
        exit_layers=tuple(model.config.exit_layers),
        num_layers=model.config.num_hidden_layers,
        blocks=len(blocks),
        tokens=blocks[:, 1:].numel(),
        loss=means["loss"],
        perplexity=perplexity(means["loss"]),
        head_losses=tuple(means["heads"]),
        head_perplexities=tuple(map(perplexity, means["heads"])),
        greedy_loss=means["greedy loss"],
        greedy_perplexity=perplexity(means["greedy loss"]),
        block_losses=tuple(by_block["loss"].tolist()),
        sampled=_exit_use(by_block["sampled"].mean(0), model.config, bytes_per_exit, itemsize),
        greedy=_exit_use(by_block["greedy"].mean(0), model.config, bytes_per_exit, itemsize),
        exit_bytes=tuple(bytes_per_exit),
        agreement=None if parent_top is None else tuple(means["agreement"]),
        greedy_agreement=None if parent_top is None else means["greedy agreement"],
    )


@torch.no_grad()
def evaluate_dense(
    model: "PreTrainedModel", blocks: torch.Tensor, batch_size: int = 1, *, title: str = "Dense"
) -> DenseEvaluation:
    """Run a dense model over blocks of tokens; see `evaluate_nvium`.

    Args:
        model: a causal language model of transformers whose logits are its unembedding applied to
            the last hidden state (a family of N-vium models).
    """
    losses = []
    for _, input_ids in _batches(blocks, batch_size, model.device, title):
        log_probs = dense_target_log_probs(model, input_ids, next_tokens(input_ids))
        losses.append(-log_probs[:, :-1].double().mean(dim=1).cpu())
    block_losses = torch.cat(losses)
    loss = float(block_losses.mean())
    return DenseEvaluation(
        blocks=len(blocks),
        tokens=blocks[:, 1:].numel(),
        loss=loss,
        perplexity=perplexity(loss),
        block_losses=tuple(block_losses.tolist()),
        bytes_per_token=_dense_bytes(model),
    )


@torch.no_grad()
def dense_top_tokens(
    model: "PreTrainedModel", blocks: torch.Tensor, batch_size: int = 1
) -> torch.Tensor:
    """The most likely next token of a dense model at every position but the last, `[blocks, T - 1]`
    int64 on the CPU; see `evaluate_dense`."""
    found, unembedding = [], model.get_output_embeddings().weight
    for _, input_ids in _batches(blocks, batch_size, model.device, "Dense parent's tokens"):
        hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        found.append(top_tokens(hidden[:, :-1], unembedding).cpu())
    return torch.cat(found)


def _block_values(
    model: "NviumForCausalLM", input_ids: torch.Tensor, parent_top: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """One forward pass: means over the tokens of each block, float64 on the CPU.

    Returns:
        loss, greedy loss, greedy agreement `[B]`; heads, sampled, greedy, agreement `[B, N]`.
    """
    output = model(input_ids=input_ids, use_cache=False, compute_logits=False)
    mixture, heads = mixture_target_log_probs(model, output, next_tokens(input_ids))
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
        hits = _agreement(model, output.head_hidden[:, :-1], parent_top)
        values["agreement"] = hits.double().mean(dim=1)
        values["greedy agreement"] = hits.gather(-1, exits).double().mean(dim=(1, 2))
    return {name: value.cpu() for name, value in values.items()}


def _batches(
    blocks: torch.Tensor, batch_size: int, device: torch.device, title: str
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Slices of block numbers and their `[B, T]` tokens."""
    if len(blocks) == 0:
        raise UserError("The text has no whole block, so more text or shorter blocks are needed.")
    with progress(title, len(blocks), "block") as bar:
        for start in range(0, len(blocks), batch_size):
            rows = slice(start, start + batch_size)
            yield rows, blocks[rows].to(device)
            bar.update(len(blocks[rows]))


def _skipped(model: "NviumForCausalLM") -> tuple[list[bool], list[bool]]:
    """Which routers are constant `[N-1]` and which adapters the identity `[N]`, as vLLM's model
    sees it when it loads these weights."""
    adapters = [exit.adapter for exit in model.exits] + [model.final_adapter]
    return (
        [not bool(exit.router.head.weight.any()) for exit in model.exits],
        [adapter is None or not bool(adapter.fc2.weight.any()) for adapter in adapters],
    )


def _agreement(
    model: "NviumForCausalLM", head_hidden: torch.Tensor, parent_top: torch.Tensor
) -> torch.Tensor:
    """`[B, T, N, H]` head inputs -> `[B, T, N]` bool: a head's top token is the parent's."""
    parent_top = parent_top.to(head_hidden.device)
    hits = [
        top_tokens(head_hidden[..., k, :], unembedding_of(model, k)) == parent_top
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
    """All layers (of their experts, those that a token is sent to), the norm and the unembedding;
    of the embeddings one row is read."""
    weights, config = 0, model.config
    for name, parameter in model.base_model.named_parameters():
        if ".experts." in name:  # [experts, ...]
            weights += config.num_experts_per_tok * parameter[0].numel()
        else:
            weights += parameter.numel()
    weights -= model.get_input_embeddings().weight.numel()
    weights += model.get_output_embeddings().weight.numel()
    return weights * next(model.parameters()).element_size()
