# SPDX-License-Identifier: Apache-2.0
"""What the slim verifier makes of drafts, as functions of plain tensors beside their formulas: the
lossless check, which leaves exactly a draw of the slim law, and the paper's three tiers.

Notation (arXiv:2606.12243): `p` the drafter, `q'` the slim verifier, `q` the full model; B
requests, D drafts, V vocabulary.
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


def check_greedy(drafts: torch.Tensor, counts: torch.Tensor, top: torch.Tensor) -> Checked:
    """Lossless check at temperature 0.

        keep v_i while v_i = argmax q'_i,   then   argmax q'_n

    Args:
        drafts: [B, D] int64; columns from `counts` on are padding.
        counts: [B] int64, drafts of each request.
        top: [B, D + 1] int64, `argmax q'` at each draft and behind the last.
    """
    same = (drafts == top[:, :-1]) & _within(counts, drafts.shape[1])
    accepted = _leading(same)
    token = top.gather(1, accepted[:, None]).squeeze(1)
    return Checked(accepted, token, torch.zeros_like(top))


def check_sampled(
    drafts: torch.Tensor,
    counts: torch.Tensor,
    draft_probs: torch.Tensor | None,
    slim_probs: torch.Tensor,
    generator: torch.Generator | None = None,
) -> Checked:
    """Lossless check by rejection sampling: what is left is exactly a draw from `q'`.

        keep v_i with probability min(1, q'_i(v_i) / p_i(v_i));
        where it is not kept draw from  max(0, q'_i - p_i) / sum;  behind the last draft from q'

    Args:
        drafts, counts: as in `check_greedy`.
        draft_probs: [B, D, V] float32, `p`; None for drafts that were not drawn (a point mass).
        slim_probs: [B, D + 1, V] float32, `q'`.
    """
    size, most = drafts.shape
    rows = torch.arange(size, device=drafts.device)
    safe = drafts.clamp(min=0)
    target = slim_probs[:, :most].gather(2, safe[:, :, None]).squeeze(2)  # [B, D]
    proposed = torch.ones_like(target)
    if draft_probs is not None:
        proposed = draft_probs.gather(2, safe[:, :, None]).squeeze(2)
    uniform = torch.rand(size, most, generator=generator, device=drafts.device)
    keep = (uniform * proposed < target) & _within(counts, most)
    accepted = _leading(keep)
    law = slim_probs[rows, accepted].clone()  # [B, V]
    rejected = accepted < counts
    at = accepted.clamp(max=max(most - 1, 0))
    if most and draft_probs is None:
        # q' without the draft: max(0, q' - point mass).
        law[rows[rejected], safe[rows, at][rejected]] = 0.0
    elif most:
        assert draft_probs is not None
        residual = (law - draft_probs[rows, at]).clamp_(min=0.0)
        law = torch.where(rejected[:, None], residual, law)
    return Checked(accepted, draw(law, generator), _all_accept(slim_probs))


def paper_tiers(
    drafts: torch.Tensor, slim_probs: torch.Tensor, accept: torch.Tensor, escalate: torch.Tensor
) -> torch.Tensor:
    """The paper's tier of every draft, whatever stands before it.

        r = q'(v) / max_u q'(u)
        ACCEPT if r >= accept,   REGENERATE if escalate <= r < accept,   ESCALATE if r < escalate

    Args:
        drafts: [B, D] int64.
        slim_probs: [B, D + 1, V] float32.
        accept, escalate: [B] float32, thresholds of each request.

    Returns:
        [B, D] int64.
    """
    at_draft = slim_probs[:, : drafts.shape[1]]
    value = at_draft.gather(2, drafts.clamp(min=0)[:, :, None]).squeeze(2)
    share = value / at_draft.amax(dim=2)
    tiers = torch.full_like(drafts, ESCALATE)
    tiers[share >= escalate[:, None]] = REGENERATE
    tiers[share >= accept[:, None]] = ACCEPT
    return tiers


def check_paper(
    drafts: torch.Tensor,
    counts: torch.Tensor,
    slim_probs: torch.Tensor,
    accept: torch.Tensor,
    escalate: torch.Tensor,
    is_greedy: torch.Tensor,
    generator: torch.Generator | None = None,
) -> Checked:
    """The paper's scan of a block: drafts are kept up to the first of tier B, which the slim
    verifier draws again; those of tier C stay in the window for the full model to decide.

    Args:
        drafts, counts, slim_probs, accept, escalate: as in `paper_tiers`.
        is_greedy: [B] bool, draw again by argmax.

    Returns:
        `token` is -1 where no draft is of tier B: the block ends without a token of its own.
    """
    size, most = drafts.shape
    tiers = paper_tiers(drafts, slim_probs, accept, escalate)
    within = _within(counts, most)
    accepted = _leading((tiers != REGENERATE) & within)
    again = accepted < counts
    law = slim_probs[torch.arange(size, device=drafts.device), accepted]
    drawn = torch.where(is_greedy, law.argmax(dim=1), draw(law, generator))
    token = torch.where(again, drawn, torch.full_like(drawn, -1))
    padded = torch.cat([tiers, tiers.new_full((size, 1), REGENERATE)], dim=1)
    padded.scatter_(1, accepted[:, None], REGENERATE)  # of `token`
    return Checked(accepted, token, padded)


def paper_law(
    p: torch.Tensor, slim: torch.Tensor, q: torch.Tensor, accept: float, escalate: float
) -> torch.Tensor:
    """Law of one token under the paper's rule, with a lossless decision at `q`.

        out(x) = p(x) 1[x in A] + p(B) q'(x)
                 + sum_{u in C} p(u) { a_u 1[x = u] + (1 - a_u) norm(max(0, q - p))(x) }
        a_u = min(1, q(u) / p(u)),   p(B) = sum_{u in B} p(u)

    Args:
        p, slim, q: [V] float64.

    Returns:
        [V] float64.
    """
    tokens = torch.arange(len(p))[None, :]
    repeated = slim.expand(1, len(p) + 1, len(p))
    tiers = paper_tiers(tokens, repeated, torch.tensor([accept]), torch.tensor([escalate]))[0]
    a, b, c = (tiers == tier for tier in (ACCEPT, REGENERATE, ESCALATE))
    keep = torch.where(p > 0, (q / p).clamp(max=1.0), torch.zeros_like(p))
    residual = (q - p).clamp(min=0.0)
    residual = residual / residual.sum() if residual.sum() > 0 else residual
    escalated = torch.where(c, p * keep, torch.zeros_like(p))
    lost = float((p * (1 - keep))[c].sum())
    return torch.where(a, p, torch.zeros_like(p)) + p[b].sum() * slim + escalated + lost * residual


def draw(law: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """One token from each row of weights [B, V], which need not sum to 1: `argmax w / Exp(1)`."""
    noise = torch.empty_like(law).exponential_(generator=generator)
    # Where rounding left no weight at all any token will do; argmax gives the first.
    return (law / noise).argmax(dim=1)


def _within(counts: torch.Tensor, most: int) -> torch.Tensor:
    return torch.arange(most, device=counts.device)[None, :] < counts[:, None]


def _leading(keep: torch.Tensor) -> torch.Tensor:
    """[B, D] bool -> [B] int64, how many leading ones."""
    return keep.long().cumprod(dim=1).sum(dim=1)


def _all_accept(slim_probs: torch.Tensor) -> torch.Tensor:
    return torch.zeros(slim_probs.shape[:2], dtype=torch.int64, device=slim_probs.device)
