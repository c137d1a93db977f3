# SPDX-License-Identifier: Apache-2.0
"""The window of VIA-SD: rounds of drafting and slim checks that grow what one pass of the full
model then verifies (arXiv:2606.12243, section 3; the lossless rule is ours). It knows the slim tier
only as a cheaper pass that gives logits, and the drafter only as something that answers with
tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from vllm_nvium.model_executor.ops.tiers import (
    ACCEPT,
    ESCALATE,
    Checked,
    check_greedy,
    check_paper,
    check_sampled,
)


@dataclass(slots=True)
class Window:
    """What one request has between two passes of the full model.

    Attributes:
        request: its row in the model runner's batch.
        position: of its newest token, whose K/V no pass has written yet.
        newest: that token.
        limit: most tokens the window may hold.
        is_greedy, is_paper: temperature 0; the paper's rule.
        accept, escalate: thresholds of the paper's rule.
        stop_tokens: after one of these nothing more is drafted.
        keeps_laws: the laws of its tokens are kept as proposals; without them a token counts as a
            point mass, which is exact too but rejected more often.
        tokens, tiers, laws: of the window so far; laws are [V] float32.
    """

    request: int
    position: int
    newest: int
    limit: int
    is_greedy: bool = True
    is_paper: bool = False
    accept: float = 0.5
    escalate: float = 0.3
    stop_tokens: frozenset[int] = frozenset()
    keeps_laws: bool = False
    tokens: list[int] = field(default_factory=list)
    tiers: list[int] = field(default_factory=list)
    laws: list[torch.Tensor] = field(default_factory=list)
    is_open: bool = True
    rounds: int = 0

    @property
    def room(self) -> int:
        return self.limit - len(self.tokens)

    @property
    def last_token(self) -> int:
        """The token that the next slim pass starts from."""
        return self.tokens[-1] if self.tokens else self.newest

    @property
    def last_position(self) -> int:
        return self.position + len(self.tokens)


@dataclass(frozen=True)
class Drafts:
    """What the drafter proposes for some windows, in their order.

    Attributes:
        tokens: one list per window, perhaps empty.
        probs: [B, D, V] float32, the law of each draft; None for drafts that were not drawn.
    """

    tokens: list[list[int]]
    probs: torch.Tensor | None = None

    def __bool__(self) -> bool:
        return any(self.tokens)

    def of(self, windows: Sequence[int]) -> "Drafts":
        """Those of some of the windows, by their positions."""
        probs = None if self.probs is None else self.probs[list(windows)]
        return Drafts([self.tokens[i] for i in windows], probs)

    def trimmed(self, rooms: Sequence[int]) -> "Drafts":
        """As many as fit into the windows with a token of the slim tier behind them."""
        kept = [d[: max(room - 1, 0)] for d, room in zip(self.tokens, rooms, strict=True)]
        most = max(map(len, kept), default=0)
        return Drafts(kept, None if self.probs is None else self.probs[:, :most])


# Logits [T, V] of rows of windows -> their laws under each request's temperature, top-k and top-p.
ToLaws = Callable[[torch.Tensor, Sequence[Window], torch.Tensor], torch.Tensor]


def check_round(
    windows: Sequence[Window],
    drafts: Drafts,
    slim_logits: torch.Tensor,
    to_laws: ToLaws,
    generator: torch.Generator | None = None,
) -> Checked:
    """The slim check of one round, each request by its own rule; the windows are not changed.

    Args:
        windows: B open windows; drafts: of each of them.
        slim_logits: [T, V], of the rows [last token, drafts] of each window in turn.
        to_laws: makes laws of logits; not called when all requests are greedy and lossless.
    """
    counts = torch.tensor([len(tokens) for tokens in drafts.tokens])
    most = int(counts.max())
    padded = torch.full((len(windows), most), -1)
    for row, tokens in enumerate(drafts.tokens):
        padded[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
    rows = rows_of(counts, most)
    if all(window.is_greedy and not window.is_paper for window in windows):
        return check_greedy(padded, counts, slim_logits.argmax(dim=-1).cpu()[rows])
    laws = to_laws(slim_logits, windows, counts)[rows]  # [B, D + 1, V]
    device = laws.device
    padded, counts = padded.to(device), counts.to(device)
    found = check_sampled(padded, counts, drafts.probs, laws, generator)
    is_paper = torch.tensor([window.is_paper for window in windows], device=device)
    if is_paper.any():
        paper = check_paper(
            padded,
            counts,
            laws,
            torch.tensor([window.accept for window in windows], device=device),
            torch.tensor([window.escalate for window in windows], device=device),
            torch.tensor([window.is_greedy for window in windows], device=device),
            generator,
        )
        found = Checked(
            torch.where(is_paper, paper.accepted, found.accepted),
            torch.where(is_paper, paper.token, found.token),
            torch.where(is_paper[:, None], paper.tiers, found.tiers),
        )
    for row, window in enumerate(windows):
        if window.keeps_laws:
            window.laws += _proposals(window, found, row, laws[row], drafts)
    return found


def extend(windows: Sequence[Window], drafts: Drafts, found: Checked) -> None:
    """Adds to each window what its check left, and closes those that are done."""
    accepted, token, tiers = found.accepted.tolist(), found.token.tolist(), found.tiers.tolist()
    for row, window in enumerate(windows):
        new = drafts.tokens[row][: accepted[row]]
        kinds = tiers[row][: accepted[row]]
        if token[row] >= 0:
            new, kinds = [*new, token[row]], [*kinds, tiers[row][accepted[row]]]
        # Nothing stays behind a token that ends the text.
        for place, each in enumerate(new):
            if each in window.stop_tokens:
                new, kinds = new[: place + 1], kinds[: place + 1]
                break
        window.tokens += new
        window.tiers += kinds if window.is_paper else [ACCEPT] * len(new)
        window.rounds += 1
        del window.tokens[window.limit :], window.tiers[window.limit :]
        del window.laws[len(window.tokens) :]
        window.is_open = (
            bool(new)
            and window.room > 0
            and window.stop_tokens.isdisjoint(new)
            and not (window.is_paper and ESCALATE in kinds)
        )


def rows_of(counts: torch.Tensor, most: int) -> torch.Tensor:
    """[B, D + 1] int64: where the rows of each window are among those of a pass; padding repeats
    the last row of its window."""
    starts = torch.cumsum(counts + 1, dim=0) - (counts + 1)
    return starts[:, None] + torch.minimum(torch.arange(most + 1)[None, :], counts[:, None])


def _proposals(
    window: Window, found: Checked, row: int, laws: torch.Tensor, drafts: Drafts
) -> list[torch.Tensor]:
    """The law that each new token of a window was drawn from, for the full model's rejection
    sampling: the slim law, or in the paper's mode the drafter's (only tier C is asked about)."""
    accepted = int(found.accepted[row])
    if not window.is_paper:
        return [law.clone() for law in laws[: accepted + 1]]
    new = drafts.tokens[row][:accepted]
    if int(found.token[row]) >= 0:
        new = [*new, int(found.token[row])]
    proposals = []
    for place, token in enumerate(new):
        if place < accepted and drafts.probs is not None:
            proposals.append(drafts.probs[row, place].clone())
        else:
            proposals.append(point_mass(token, laws.shape[-1], laws.device))
    return proposals


def point_mass(token: int, vocabulary: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """[V] float32, all weight on one token."""
    law = torch.zeros(vocabulary, device=device)
    law[token] = 1.0
    return law
