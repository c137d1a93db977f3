# SPDX-License-Identifier: Apache-2.0
"""What is kept, each request by its own rule: of a round's drafts by the slim verifier, and of a
window without asking the full model (arXiv:2606.12243, section 3; the lossless rule is ours).
"""

from collections.abc import Sequence

import torch

from vllm_nvium.model_executor.ops.tiers import ESCALATE, Checked, check_lossless, check_paper
from vllm_nvium.model_executor.via_sd.step import Drafts, SlimDraws, Window


def check_round(windows: Sequence[Window], drafts: Drafts, draws: SlimDraws) -> Checked:
    """The slim check of one round, each request by its own rule; the windows are not changed.

    Args:
        windows: B open windows; drafts: of each of them; draws: of the pass over both.
    """
    counts = torch.tensor([len(tokens) for tokens in drafts.tokens])
    most = int(counts.max())
    padded = torch.full((len(windows), most), -1)
    for row, tokens in enumerate(drafts.tokens):
        padded[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
    rows = rows_of(counts, most)
    drawn = draws.tokens[rows]
    found = check_lossless(padded, counts, drawn)
    if draws.shares is None:
        return found
    paper = check_paper(
        counts,
        draws.shares[rows[:, :-1]],
        drawn,
        torch.tensor([window.accept for window in windows]),
        torch.tensor([window.escalate for window in windows]),
    )
    is_paper = torch.tensor([window.is_paper for window in windows])
    return Checked(
        torch.where(is_paper, paper.accepted, found.accepted),
        torch.where(is_paper, paper.token, found.token),
        torch.where(is_paper[:, None], paper.tiers, found.tiers),
    )


def kept_unasked(window: Window | None, drafts: Sequence[int]) -> list[bool]:
    """[n], for each draft that the full model is about to verify whether it stays whatever that
    says: under the paper's rule all but those that escalate.

    Args:
        window: that the drafts are of. vLLM may have cut it short, or replaced its tokens when the
            request was preempted: then nothing is kept unasked.
    """
    count = len(drafts)
    if window is None or not window.is_paper or list(drafts) != window.tokens[:count]:
        return [False] * count
    return [tier != ESCALATE for tier in window.tiers[:count]]


def rows_of(counts: torch.Tensor, most: int) -> torch.Tensor:
    """[B, D + 1] int64: where the rows of each window are among those of a pass; padding repeats
    the last row of its window."""
    starts = torch.cumsum(counts + 1, dim=0) - (counts + 1)
    return starts[:, None] + torch.minimum(torch.arange(most + 1)[None, :], counts[:, None])
