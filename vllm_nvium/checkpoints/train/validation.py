# SPDX-License-Identifier: Apache-2.0
"""Losses of a model on validation texts, each text by itself: their mean would let a run sell one
kind of text for another. Training steers and is calibrated by them; `evaluate.py` says more, and is
for people.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vllm_nvium.checkpoints import IGNORED
from vllm_nvium.checkpoints.train.loss import (
    dense_target_log_probs,
    mixture_target_log_probs,
    next_tokens,
)
from vllm_nvium.model_executor.ops.mixture import expected_depth


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
    found = {name: _text_loss(model, text, batch_size, is_dense) for name, text in texts.items()}
    model.train(was_training)
    depths = [depth for _, depth in found.values()]
    return Losses(
        by_text={name: loss for name, (loss, _) in found.items()},
        depth=None if is_dense else sum(depths) / len(depths),
    )


@torch.no_grad()
def _text_loss(model: Any, blocks: Any, batch_size: int, is_dense: bool) -> tuple[float, float]:
    loss, depth, count = 0.0, 0.0, 0
    for first in range(0, len(blocks), batch_size):
        rows = blocks[first : first + batch_size]
        batch = rows["input_ids"].to(model.device)
        targets = next_tokens(rows["labels"].to(model.device))
        count += int((targets != IGNORED).sum())
        if is_dense:
            loss -= float(dense_target_log_probs(model, batch, targets).double().sum())
            continue
        output = model(input_ids=batch, compute_logits=False, use_cache=False)
        mixture, _ = mixture_target_log_probs(model, output, targets)
        loss -= float(mixture.double().sum())
        config = model.config
        shares = expected_depth(
            output.exit_log_weights[:, :-1], config.exit_layers, config.num_hidden_layers
        )
        depth += float(shares.double().mean()) * len(batch)
    return loss / count, depth / len(blocks)
