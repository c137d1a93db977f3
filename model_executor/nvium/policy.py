# SPDX-License-Identifier: Apache-2.0
"""Who leaves at which exit. The cascade, evaluation and benchmarks all ask here, so that another
rule is another function in this file.
"""

from typing import TypeVar

import numpy as np
import torch

from vllm_nvium.model_executor.ops.draws import margin_thresholds

Values = TypeVar("Values", np.ndarray, torch.Tensor)


def thresholds(
    seeds: np.ndarray,
    positions: np.ndarray,
    greedy: np.ndarray,
    greedy_margin: float,
    num_exits: int,
) -> np.ndarray:
    """What each token's margin `e_k - c_k` must exceed to leave at exit k.

    A sampled token leaves with the probability `p_k = sigmoid(e_k - c_k)` (arXiv:2605.13190, the
    hazard of exit k), a greedy one where the margin exceeds one number.

    Args:
        seeds: [R] uint64; positions: [R] int64, of the tokens whose head is drawn.
        greedy: [R] bool.
        greedy_margin: of the model's configuration; 0 is `p_k > 1/2`.

    Returns:
        [R, num_exits] float64.
    """
    if greedy.all():
        return np.full((len(greedy), num_exits), greedy_margin)
    found = margin_thresholds(seeds, positions, num_exits)
    found[greedy] = greedy_margin
    return found


def leaves(margins: Values, thresholds: Values | float) -> Values:
    """Who leaves: `e_k - c_k > threshold`, and whoever's margin is not a number. Its hazard is none
    either, so no distribution says what comes next; the cascade makes the head's input NaN."""
    return ~(margins <= thresholds)


def first_exit(leaving: torch.Tensor) -> torch.Tensor:
    """[..., N-1] bool, who would leave at each exit -> [...] int64, the exit that each token leaves
    at: the first, or N-1 (the final head) where it leaves at none."""
    final = torch.ones_like(leaving[..., :1])
    return torch.cat((leaving, final), dim=-1).long().argmax(dim=-1)
