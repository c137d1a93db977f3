# SPDX-License-Identifier: Apache-2.0
"""What an evaluation found, as numbers with names. The names are those of the JSON that
`vllm-nvium eval --json` writes.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from vllm_nvium.checkpoints.evaluate.formulas import paired_log_ratio, perplexity


@dataclass(frozen=True)
class ExitUse:
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
class Evaluation:
    """An N-vium model on one text. Losses are in nats per token.

    Attributes:
        exit_layers: `l_k` of the early exits; `num_layers` is L.
        tokens: how many tokens were predicted, in so many `blocks`.
        loss: mean `-log p_mix`; `perplexity` is of this.
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
    blocks: int
    tokens: int
    loss: float
    perplexity: float
    head_losses: tuple[float, ...]
    head_perplexities: tuple[float, ...]
    greedy_loss: float
    greedy_perplexity: float
    block_losses: tuple[float, ...]
    sampled: ExitUse
    greedy: ExitUse
    exit_bytes: tuple[int, ...]
    agreement: tuple[float, ...] | None = None
    greedy_agreement: float | None = None

    def depths(self) -> tuple[int, ...]:
        """Layers that a token of each head runs, N numbers."""
        return (*self.exit_layers, self.num_layers)


@dataclass(frozen=True)
class DenseEvaluation:
    """A dense model on one text; see `Evaluation`. `bytes_per_token` is at batch 1."""

    blocks: int
    tokens: int
    loss: float
    perplexity: float
    block_losses: tuple[float, ...]
    bytes_per_token: int


@dataclass(frozen=True)
class Comparison:
    """An N-vium model beside a dense one on the same blocks.

    Attributes:
        log_ratio: log of mixture perplexity over dense perplexity; negative is better.
        log_ratio_standard_error: paired over blocks, `None` with one block.
        sampled_expected_speedup, greedy_expected_speedup: at batch 1, the dense model's bytes per
            token over the N-vium model's.
    """

    log_ratio: float
    log_ratio_standard_error: float | None
    perplexity_ratio: float
    sampled_expected_speedup: float
    greedy_expected_speedup: float


@dataclass(frozen=True)
class TextResult:
    """Both models on one text; `dense` and `comparison` are `None` without a parent."""

    sources: list[str]
    nvium: Evaluation
    dense: DenseEvaluation | None = None
    comparison: Comparison | None = None


@dataclass(frozen=True)
class Report:
    """Everything measured, by the name of the text, and what it was measured with."""

    model: str
    dense: str | None
    dtype: str
    block_size: int
    batch_size: int
    max_tokens: int | None
    device: str
    texts: dict[str, TextResult]
    versions: dict[str, str]


def compare(evaluation: Evaluation, dense: DenseEvaluation) -> Comparison:
    """Both on the same blocks, in the same order."""
    log_ratio, error = paired_log_ratio(evaluation.block_losses, dense.block_losses)
    return Comparison(
        log_ratio=log_ratio,
        log_ratio_standard_error=error,
        perplexity_ratio=perplexity(log_ratio),
        sampled_expected_speedup=dense.bytes_per_token / evaluation.sampled.bytes_per_token,
        greedy_expected_speedup=dense.bytes_per_token / evaluation.greedy.bytes_per_token,
    )


def to_json(result: Any) -> dict[str, Any]:
    """One of these as plain values for `json.dumps`; what is not finite becomes `None`, for which
    JSON has no word."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return plain(dataclasses.asdict(result))
