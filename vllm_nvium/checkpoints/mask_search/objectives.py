# SPDX-License-Identifier: Apache-2.0
"""What a mask is worth on a text: the slim verifier's predictions against the full model's.

Notation: L layers, B blocks of T tokens, N = B T prefixes, V vocabulary, q the full model, p the
slim verifier (q without the skipped layers). Divergences are in nats per prefix.

Source: arXiv:2606.12243, the objective DIMR.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vllm_nvium.errors import UserError
from vllm_nvium.model_executor.via_sd.mask import layer_list

# The full model's log-probabilities are kept in memory, in this type and at most this many bytes.
CACHE_DTYPE = torch.float16
LARGEST_CACHE = 4 * 2**30
# Log-probabilities are computed in float32 for this many rows at a time.
CHUNK = 128


def divergence(log_q: torch.Tensor, log_p: torch.Tensor, alpha: float, beta: float) -> torch.Tensor:
    """How much of p lies where q has less: the paper's R(q || p), at every prefix.

        R(q || p) = sum_v p(v) max(0, z1(v)) + sum_v q(v) max(0, z2(v))
        z1 = log(1 - alpha) + log p - log q,   z2 = log beta + log p - log q

    With alpha = 0 and beta = 1 it is 0 exactly where p = q. A larger alpha and a smaller beta
    forgive more of what p has too much of.

    Args:
        log_q: `[..., V]`, of the full model, finite.
        log_p: `[..., V]`, of the slim verifier, finite.
        alpha: in [0, 1).
        beta: at least 1 - alpha.

    Returns:
        `[...]`, nats.
    """
    ratio = log_p - log_q
    z1, z2 = ratio + math.log1p(-alpha), ratio + math.log(beta)
    return (log_p.exp() * z1.relu() + log_q.exp() * z2.relu()).sum(dim=-1)


def agreement(top_q: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """1 where both models have the same most likely token, 0 elsewhere; `[...]` float64.

    Args:
        top_q: `[...]` int64, `argmax_v q(v)`.
        top_p: `[...]` int64, `argmax_v p(v)`.
    """
    return (top_q == top_p).double()


class Skipped(nn.Module):
    """Stands in the place of a skipped layer and returns its input. The place must stay filled,
    because models look up a layer's attention window by the layer's index."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """`hidden_states` `[B, T, H]`, unchanged."""
        return hidden_states


@contextmanager
def skipping_layers(model: Any, skipped: Sequence[int]) -> Iterator[None]:
    """Within the block, `model` is its slim verifier: the same weights without some layers.

    Args:
        model: a decoder of `transformers` whose layers are the list `model.model.layers`.
        skipped: indices of layers.
    """
    layers = model.model.layers
    model.model.layers = nn.ModuleList(
        Skipped() if index in skipped else layer for index, layer in enumerate(layers)
    )
    try:
        yield
    finally:
        model.model.layers = layers


class TeacherForcing:
    """Scores masks on a text. At every prefix, the slim verifier's prediction is compared with the
    full model's, which is computed once.

    Args:
        model: see `skipping_layers`; in eval mode.
        blocks: `[B, T]` int64, token ids; every position of every block is a prefix.
        objective: `divergence` (the mean over prefixes, less is better) or `agreement` (the share
            of prefixes, more is better).
        alpha, beta: see `divergence`.
    """

    def __init__(
        self,
        model: Any,
        blocks: torch.Tensor,
        objective: str,
        alpha: float = 0.0,
        beta: float = 1.0,
    ) -> None:
        self.model, self.blocks, self.objective = model, blocks, objective
        self.alpha, self.beta = alpha, beta
        self._full = [self._summary(logits) for logits in self._logits()]
        self(())  # refuses a model whose own predictions are not finite

    def __call__(self, skipped: tuple[int, ...]) -> float:
        """The score of a mask, finite.

        Raises:
            UserError: the slim verifier's predictions are not finite.
        """
        total = 0.0
        with skipping_layers(self.model, skipped):
            for full, logits in zip(self._full, self._logits(), strict=True):
                total += float(self._compare(full, logits).double().sum())
        if not math.isfinite(total):
            where = f"Without layers {layer_list(skipped)} " if skipped else ""
            raise UserError(
                f"{where}TARGET's predictions are not finite in {self.model.dtype}: use --dtype "
                "float32, or another checkpoint."
            )
        return total / self.blocks.numel()

    @torch.inference_mode()
    def _logits(self) -> Iterator[torch.Tensor]:
        for block in self.blocks:
            ids = block[None].to(self.model.device)
            yield self.model(input_ids=ids, use_cache=False).logits[0]  # [T, V]

    def _summary(self, logits: torch.Tensor) -> torch.Tensor:
        """What is kept of the full model's predictions: `[T]` int64, or `[T, V]` float16."""
        if self.objective == "agreement":
            return logits.argmax(dim=-1)
        rows = [part.float().log_softmax(dim=-1).to(CACHE_DTYPE) for part in logits.split(CHUNK)]
        return torch.cat(rows).cpu()

    def _compare(self, full: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The score of every prefix of a block, `[T]`."""
        if self.objective == "agreement":
            same = agreement(full, logits.argmax(dim=-1))
            # Without this, a row of NaN would count as a prediction of token 0.
            return torch.where(logits.isfinite().all(dim=-1), same, math.nan)
        rows = []
        for log_q, part in zip(full.split(CHUNK), logits.split(CHUNK), strict=True):
            log_p = part.float().log_softmax(dim=-1)
            log_q = log_q.to(part.device).float()
            rows.append(divergence(log_q, log_p, self.alpha, self.beta))
        return torch.cat(rows)


def most_tokens(vocab_size: int) -> int:
    """How many prefixes the divergence can be computed on: `N V` numbers of the full model must fit
    into `LARGEST_CACHE`."""
    return LARGEST_CACHE // (vocab_size * CACHE_DTYPE.itemsize)
