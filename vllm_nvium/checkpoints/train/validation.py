# SPDX-License-Identifier: Apache-2.0
"""Losses of a model on validation texts, each text by itself: their mean would let a run sell one
kind of text for another. Training steers and is calibrated by them; `evaluate` says more, and is
for people.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vllm_nvium.checkpoints import IGNORED
from vllm_nvium.checkpoints.evaluate.formulas import greedy_exits
from vllm_nvium.checkpoints.train.loss import (
    dense_target_log_probs,
    mixture_target_log_probs,
    next_tokens,
)
from vllm_nvium.model_executor.ops.mixture import exit_log_weights, expected_depth


@dataclass(frozen=True)
class Observed:
    """What every head makes of a text, and what the routers do.

    Attributes:
        heads: `[T, N]` float32, log-probability of the next token under every head.
        margins: `[T, N-1]` float32, `e - c`.
    """

    heads: torch.Tensor
    margins: torch.Tensor

    def loss(self, shift: float = 0.0) -> float:
        """`-mean_t log sum_k pi_k(margins + shift) q_k(y)`."""
        weights = exit_log_weights(self.margins + shift)
        return -float(torch.logsumexp(weights + self.heads, dim=-1).double().mean())

    def greedy_loss(self, greedy_margin: float) -> float:
        """`-mean_t log q_g(y)`, g the head that speaks at temperature 0; see `greedy_exits`."""
        exits = greedy_exits(self.margins, greedy_margin)
        return -float(self.heads.gather(-1, exits[:, None]).mean())

    def shifted(self, shift: float) -> "Observed":
        """What would have been observed with `shift` added to every margin."""
        return Observed(self.heads, self.margins + shift)

    def depth(self, shift: float, depths: torch.Tensor) -> float:
        """Mean share of the layers, from the share `depths` `[N]` in front of each head."""
        weights = exit_log_weights(self.margins + shift)
        return float((weights.exp() @ depths.to(weights)).mean())


@dataclass(frozen=True)
class Losses:
    """What one model loses on every text.

    Attributes:
        by_text: name of a text -> mean `-log p` of its next tokens, nats.
        depth: mean share of the layers that run, over texts; None of a dense model.
    """

    by_text: dict[str, float]
    depth: float | None

    @property
    def mean(self) -> float:
        """Over texts, each counting the same."""
        return sum(self.by_text.values()) / len(self.by_text)


def worst_text(dense: Mapping[str, float], mixture: Mapping[str, float]) -> tuple[float, float]:
    """Dense and mixture loss on the text where the mixture does worst against the dense model."""
    name = max(mixture, key=lambda text: mixture[text] - dense[text])
    return dense[name], mixture[name]


def losses_of(model: Any, texts: Mapping[str, Any], batch_size: int, is_dense: bool) -> Losses:
    """Every text in turn.

    Args:
        texts: name -> dataset of `input_ids` and `labels`, `[T]` each.
        is_dense: `model` is a dense one.
    """
    was_training = model.training
    model.eval()
    try:
        if is_dense:
            losses = {name: _dense_loss(model, text, batch_size) for name, text in texts.items()}
            return Losses(losses, None)
        found = {name: observe(model, text, batch_size) for name, text in texts.items()}
    finally:
        model.train(was_training)
    depths = [text.depth(0.0, depths_of(model)) for text in found.values()]
    losses = {name: text.loss() for name, text in found.items()}
    return Losses(losses, sum(depths) / len(depths))


@torch.no_grad()
def observe(model: Any, blocks: Any, batch_size: int) -> Observed:
    """Runs an N-vium model over a dataset of `input_ids` and `labels`, `[T]` each."""
    heads, margins = [], []
    for input_ids, targets in _batches(model, blocks, batch_size):
        output = model(input_ids=input_ids, compute_logits=False, use_cache=False)
        _, found = mixture_target_log_probs(model, output, targets)
        scored = targets != IGNORED
        heads.append(found[scored].float().cpu())
        margins.append(output.margins[scored].float().cpu())
    return Observed(torch.cat(heads), torch.cat(margins))


@torch.no_grad()
def _dense_loss(model: Any, blocks: Any, batch_size: int) -> float:
    found = [
        dense_target_log_probs(model, input_ids, targets)[targets != IGNORED].double().cpu()
        for input_ids, targets in _batches(model, blocks, batch_size)
    ]
    return -float(torch.cat(found).mean())


def _batches(
    model: Any, blocks: Any, batch_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and their targets, `[B, T]` each."""
    for rows in blocks.iter(batch_size):
        yield rows["input_ids"].to(model.device), next_tokens(rows["labels"].to(model.device))


def depths_of(model: Any) -> torch.Tensor:
    """`[N]` float32, share of the layers in front of each head."""
    count = len(model.exits) + 1
    certain = torch.full((count, count), -torch.inf).fill_diagonal_(0.0)
    return expected_depth(certain, model.config.exit_layers, model.config.num_hidden_layers)
