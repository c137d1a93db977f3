# SPDX-License-Identifier: Apache-2.0
"""What an answer under VIA-SD tells of its own tokens: which tier said each of them first, and how
often the full model was asked. Its numbers for `engine/request_metrics.py` are `TOKEN_TIERS`."""

from typing import Any

from vllm_nvium.engine.request_metrics import AnswerFormat, Told
from vllm_nvium.via_sd.options import request_metrics_level

# Whose word a token was.
DRAFTER, SLIM, FULL = range(3)
TOKEN_TIERS = ("drafter", "slim", "full")


def summary(told: Told) -> dict[str, Any]:
    """Sums of one sequence.

    Args:
        told: its `work` is the rounds of slim checks behind its windows.

    Returns:
        `drafter_tokens`, `slim_tokens` and `full_tokens`; `full_passes` that gave it tokens, the
        one that ended its prompt among them, and `full_passes_per_token`, None without tokens;
        `slim_passes` that it took part in.
    """
    tiers = told.known()
    tokens = {f"{name}_tokens": tiers.count(tier) for tier, name in enumerate(TOKEN_TIERS)}
    return tokens | {
        "full_passes": told.passes,
        "full_passes_per_token": told.passes / len(tiers) if tiers else None,
        "slim_passes": told.work,
    }


FORMAT = AnswerFormat(
    sums="via_sd",
    tokens="via_sd_token_tiers",
    level=request_metrics_level,
    named=lambda tier: TOKEN_TIERS[tier],
    summary=summary,
)
