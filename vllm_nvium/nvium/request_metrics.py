# SPDX-License-Identifier: Apache-2.0
"""What an answer of an N-vium model tells of its own tokens: where each of them left, and how deep
the steps went that gave them. The numbers of `engine/request_metrics.py` are exits here."""

from typing import Any

from vllm_nvium.engine.request_metrics import AnswerFormat, Told
from vllm_nvium.nvium.options import request_metrics_level


def summary(told: Told) -> dict[str, Any]:
    """Sums of one sequence.

    Args:
        told: its `scale` is the layers below each exit, [N]; its `work` the layers that the steps
            ran which gave it tokens.

    Returns:
        `exit_tokens` [N], tokens by exit, the last the final head; `mean_exit_layers`, the layers
        below the exit that a token left at, and `mean_run_layers`, those that its step ran, both
        None without tokens; `num_layers` of the model.
    """
    exits, layers = told.known(), told.scale
    return {
        "exit_tokens": [exits.count(exit_) for exit_ in range(len(layers))],
        "mean_exit_layers": sum(layers[e] for e in exits) / len(exits) if exits else None,
        "mean_run_layers": told.work / told.passes if told.passes else None,
        "num_layers": layers[-1] if layers else 0,
    }


FORMAT = AnswerFormat(
    sums="nvium",
    tokens="nvium_token_exits",
    level=request_metrics_level,
    named=lambda exit_: exit_,
    summary=summary,
)
