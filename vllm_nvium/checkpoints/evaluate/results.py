# SPDX-License-Identifier: Apache-2.0
"""What an evaluation found, as numbers with names. The names are those of the JSON that
`vllm-nvium eval --json` writes.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm_nvium.checkpoints.evaluate.formulas import paired_log_ratio, perplexity

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Result:
    """Numbers as fields and properties, all of which are written as JSON."""

    def to_json(self) -> dict[str, Any]:
        """Every number as a plain value for `json.dumps`; what is not finite becomes `None`, for
        which JSON has no word. Fields that are left out of `repr` are left out here too."""
        names = [entry.name for entry in dataclasses.fields(self) if entry.repr]
        names += [name for name, kind in vars(type(self)).items() if isinstance(kind, property)]
        return {name: _plain(getattr(self, name)) for name in names}


def _plain(value: Any) -> Any:
    if isinstance(value, Result):
        return value.to_json()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@dataclass(frozen=True)
class ExitUse(Result):
    """Where tokens leave under one rule, and what that saves.

    Attributes:
        shares: N numbers summing to 1, the final head's last.
        mean_depth: mean share of the layers that a token runs before it is sampled, in (0, 1].
        bytes_per_token: mean bytes of weights read per token at batch 1.
        expected_speedup: bytes of the same backbone without exits over `bytes_per_token`.
    """

    shares: tuple[float, ...]
    mean_depth: float
    bytes_per_token: float
    expected_speedup: float


@dataclass(frozen=True)
class Evaluation(Result):
    """An N-vium model on one text.

    Attributes:
        exit_layers: `l_k` of the early exits; `num_layers` is L.
        tokens: how many tokens were predicted.
        loss: mean `-log p_mix`, nats per token.
        head_losses: mean `-log q_k` of each of the N heads alone.
        greedy_loss: mean `-log q` of the head that the greedy rule picks for each token. It is the
            price of what greedy exits save, as `loss` is the price of what drawn exits save.
        block_losses: the mixture's mean loss in every block.
        sampled: exits as `routed` sampling at temperature 1 draws them.
        greedy: exits as temperature 0 takes them, see `greedy_exits`.
        exit_bytes: bytes of weights read for a token of each head.
        agreement: share of the tokens where each head's most likely token is the dense parent's;
            `None` when that was not asked.
        greedy_agreement: the same for the head that the greedy rule picks.
    """

    exit_layers: tuple[int, ...]
    num_layers: int
    tokens: int
    loss: float
    head_losses: tuple[float, ...]
    greedy_loss: float
    block_losses: tuple[float, ...]
    sampled: ExitUse
    greedy: ExitUse
    exit_bytes: tuple[int, ...]
    agreement: tuple[float, ...] | None = None
    greedy_agreement: float | None = None

    @property
    def blocks(self) -> int:
        """How many were read."""
        return len(self.block_losses)

    @property
    def perplexity(self) -> float:
        """Of the mixture."""
        return perplexity(self.loss)

    @property
    def head_perplexities(self) -> tuple[float, ...]:
        """Of each head alone."""
        return tuple(perplexity(loss) for loss in self.head_losses)

    @property
    def greedy_perplexity(self) -> float:
        """Of the head that the greedy rule picks for each token."""
        return perplexity(self.greedy_loss)

    def depths(self) -> tuple[int, ...]:
        """Layers that a token of each head runs, N numbers."""
        return (*self.exit_layers, self.num_layers)


@dataclass(frozen=True)
class DenseEvaluation(Result):
    """A dense model on one text.

    Attributes:
        tokens: how many tokens were predicted.
        loss: mean `-log p`, nats per token.
        block_losses: the mean loss in every block.
        bytes_per_token: bytes of weights read for one token at batch 1.
        top: `[blocks, T - 1]` int64 on the CPU, its most likely tokens, when they were asked for.
    """

    tokens: int
    loss: float
    block_losses: tuple[float, ...]
    bytes_per_token: int
    top: "torch.Tensor | None" = field(default=None, repr=False, compare=False)

    @property
    def blocks(self) -> int:
        """How many were read."""
        return len(self.block_losses)

    @property
    def perplexity(self) -> float:
        """`exp(loss)`."""
        return perplexity(self.loss)


@dataclass(frozen=True)
class Comparison(Result):
    """An N-vium model beside a dense one on the same blocks.

    Attributes:
        log_ratio: log of mixture perplexity over dense perplexity; negative is better.
        log_ratio_standard_error: paired over blocks, `None` with one block.
        sampled_expected_speedup, greedy_expected_speedup: at batch 1, the dense model's bytes per
            token over the N-vium model's.
    """

    log_ratio: float
    log_ratio_standard_error: float | None
    sampled_expected_speedup: float
    greedy_expected_speedup: float

    @property
    def perplexity_ratio(self) -> float:
        """Mixture perplexity over dense perplexity."""
        return perplexity(self.log_ratio)


def compare(evaluation: Evaluation, dense: DenseEvaluation) -> Comparison:
    """Both on the same blocks, in the same order.

    Raises:
        ValueError: they did not see equally many blocks.
    """
    if evaluation.blocks != dense.blocks:
        raise ValueError(
            f"{evaluation.blocks} blocks cannot be paired with {dense.blocks} of the dense model."
        )
    log_ratio, error = paired_log_ratio(evaluation.block_losses, dense.block_losses)
    return Comparison(
        log_ratio=log_ratio,
        log_ratio_standard_error=error,
        sampled_expected_speedup=dense.bytes_per_token / evaluation.sampled.bytes_per_token,
        greedy_expected_speedup=dense.bytes_per_token / evaluation.greedy.bytes_per_token,
    )
