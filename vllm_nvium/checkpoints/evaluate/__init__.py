# SPDX-License-Identifier: Apache-2.0
"""Measures N-vium checkpoints: perplexity of the mixture and of every head, exits, expected
speed-up. Importing this package imports neither torch nor transformers.
"""

from typing import TYPE_CHECKING

from vllm_nvium.checkpoints import require

if TYPE_CHECKING:
    from vllm_nvium.checkpoints.evaluate.request import Request
    from vllm_nvium.checkpoints.evaluate.results import Report


def evaluate(request: "Request") -> "Report":
    """Evaluate an N-vium checkpoint on texts, beside its dense parent if one is given.

    Raises:
        UserError: a model or a text cannot be used; found before any weights are loaded, unless
            they are the reason.
    """
    require("datasets")
    from vllm_nvium.checkpoints.evaluate.checkpoint import evaluate_checkpoint

    return evaluate_checkpoint(request)
