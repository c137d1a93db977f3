# SPDX-License-Identifier: Apache-2.0
"""What the slim verifier makes of drafts, as functions of plain tensors beside their formulas: the
lossless check, which keeps the drafts that it would have drawn itself, and the paper's three tiers.

Notation (arXiv:2606.12243): `p` the drafter, `q'` the slim verifier, `q` the full model; B
requests, D drafts, V vocabulary. `E_i` is the noise of position i, V independent draws of Exp(1)
that belong to the request and the position: whoever draws there draws `argmax q / E_i`, which has
the law `q` because `E_i` is independent of all that stands before i. The full model and the slim
verifier share it, so that they mostly draw the same token (at temperature 0: argmax).
"""

from dataclasses import dataclass

import torch

# Tiers of a token (arXiv:2606.12243, section 3).
ACCEPT, REGENERATE, ESCALATE = 0, 1, 2


@dataclass(frozen=True)
class Checked:
    """What one slim check leaves of the drafts of B requests.

    Attributes:
        accepted: [B] int64, leading drafts that are kept.
        token: [B] int64, drawn by the slim verifier behind them; -1 where there is none.
        tiers: [B, D + 1] int64, tier of each kept draft, and of `token` behind the last of them;
            in a lossless check all ACCEPT, of which the caller makes no use.
    """

    accepted: torch.Tensor
    token: torch.Tensor
    tiers: torch.Tensor


def check_lossless(drafts: torch.Tensor, counts: torch.Tensor, drawn: torch.Tensor) -> Checked:
    """Keeps what the slim verifier would have drawn itself.

        keep v_i while v_i = x_i,   then   x_n,   with   x_i = argmax q'_i / E_i

    The full model does the same with the window and `argmax q_i / E_i`. So the text is
    `argmax q_i / E_i` at every position, whatever was drafted and kept on the way: a draw of `q`,
    and for a request with a seed the one that plain decoding makes. Both models agree on a token
    with probability

        sum_x 1 / sum_y max(q'(y) / q'(x), q(y) / q(x))  >=  (1 - d) / (1 + d),

    d being the total variation distance of q' and q.

    Args:
        drafts: [B, D] int64; columns from `counts` on are padding.
        counts: [B] int64, drafts of each request.
        drawn: [B, D + 1] int64, `x_i` at each draft and behind the last.
    """
    same = (drafts == drawn[:, :-1]) & _within(counts, drafts.shape[1])
    accepted = _leading(same)
    token = drawn.gather(1, accepted[:, None]).squeeze(1)
    return Checked(accepted, token, torch.full_like(drawn, ACCEPT))


def paper_tiers(shares: torch.Tensor, accept: torch.Tensor, escalate: torch.Tensor) -> torch.Tensor:
    """The paper's tier of every draft, whatever stands before it.

        r = q'(v) / max_u q'(u)
        ACCEPT if r >= accept,   REGENERATE if escalate <= r < accept,   ESCALATE if r < escalate

    Args:
        shares: [B, D] float32, `r`.
        accept, escalate: [B] float32, thresholds of each request.

    Returns:
        [B, D] int64.
    """
    tiers = torch.full(shares.shape, ESCALATE, dtype=torch.int64, device=shares.device)
    tiers[shares >= escalate[:, None]] = REGENERATE
    tiers[shares >= accept[:, None]] = ACCEPT
    return tiers


def check_paper(
    counts: torch.Tensor,
    shares: torch.Tensor,
    drawn: torch.Tensor,
    accept: torch.Tensor,
    escalate: torch.Tensor,
) -> Checked:
    """The paper's scan of a block: drafts are kept up to the first of tier B, which the slim
    verifier draws again; those of tier C stay in the window for the full model to decide.

    Args:
        counts, shares, accept, escalate: as in `paper_tiers` and `check_lossless`.
        drawn: [B, D + 1] int64, what the slim verifier draws at each draft, with noise that is not
            `E`: see `paper_law`.

    Returns:
        `token` is -1 where no draft is of tier B: the block ends without a token of its own.
    """
    size, most = shares.shape
    tiers = paper_tiers(shares, accept, escalate)
    accepted = _leading((tiers != REGENERATE) & _within(counts, most))
    again = drawn.gather(1, accepted[:, None]).squeeze(1)
    token = torch.where(accepted < counts, again, torch.full_like(again, -1))
    padded = torch.cat([tiers, tiers.new_full((size, 1), REGENERATE)], dim=1)
    padded.scatter_(1, accepted[:, None], REGENERATE)  # of `token`
    return Checked(accepted, token, padded)


def paper_law(
    p: torch.Tensor, slim: torch.Tensor, q: torch.Tensor, accept: float, escalate: float
) -> torch.Tensor:
    """Law of one token under the paper's rule, where the full model keeps a draft of tier C iff it
    draws the same token itself.

        out(x) = p(x) 1[x in A]  +  p(B) q'(x)  +  p(C) q(x),      p(B) = sum_{u in B} p(u)

    The tier depends on the draft alone. In C the outcome is the full model's own draw
    `argmax q / E` whether or not the draft is equal to it, and has the law `q` because the draft
    is independent of `E`: drafters draw with noise of their own, or none. In B the slim verifier
    draws with noise of its own, too. With `E` the law would be the same as long as what it draws
    stays; but where a grammar forbids that token the full model draws after all, and its draw must
    not depend on an `E` of which it is known that `argmax q' / E` is forbidden.

    Args:
        p, slim, q: [V] float64.

    Returns:
        [V] float64.
    """
    shares = (slim / slim.max())[None, :]
    tiers = paper_tiers(shares, torch.tensor([accept]), torch.tensor([escalate]))[0]
    a, b, c = (tiers == tier for tier in (ACCEPT, REGENERATE, ESCALATE))
    return torch.where(a, p, torch.zeros_like(p)) + p[b].sum() * slim + p[c].sum() * q


def _within(counts: torch.Tensor, most: int) -> torch.Tensor:
    return torch.arange(most, device=counts.device)[None, :] < counts[:, None]


def _leading(keep: torch.Tensor) -> torch.Tensor:
    """[B, D] bool -> [B] int64, how many leading ones."""
    return keep.long().cumprod(dim=1).sum(dim=1)
