# SPDX-License-Identifier: Apache-2.0
"""The window of VIA-SD: rounds of drafting and slim checks that grow what one pass of the full
model then verifies (arXiv:2606.12243, section 3; the lossless rule is ours). It knows the slim tier
only as a cheaper pass that gives logits, and the drafter only as something that answers with
tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from vllm_nvium.model_executor.ops.tiers import ACCEPT, ESCALATE, Checked


@dataclass(slots=True)
class Window:
    """What one request has between two passes of the full model.

    Attributes:
        request: its row in the model runner's batch.
        position: of its newest token, whose K/V no pass has written yet.
        newest: that token.
        limit: most tokens the window may hold.
        is_paper: under the paper's rule.
        accept, escalate: thresholds of the paper's rule.
        stop_tokens: after one of these nothing more is drafted.
        tokens, tiers: of the window so far.
        confidences: the largest probability of the slim verifier's law where it drew each of them.
        drafted: whether each of them was a draft, and not the slim verifier's own.
        noise: how many tokens of it stand before a position -> state of the request's generator
            before it draws the noise of that position, where that is known.
    """

    request: int
    position: int
    newest: int
    limit: int
    is_paper: bool = False
    accept: float = 0.5
    escalate: float = 0.3
    stop_tokens: frozenset[int] = frozenset()
    tokens: list[int] = field(default_factory=list)
    tiers: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    drafted: list[bool] = field(default_factory=list)
    noise: dict[int, torch.Tensor] = field(default_factory=dict)
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


def rooms(windows: Sequence[Window], max_rows: int) -> list[int]:
    """Tokens that each window may grow by, so that all of them fit into one pass of the slim
    verifier, and then of a draft model, which adds a row of its own for each.

    Args:
        max_rows: of a pass.
    """
    most = max_rows // max(len(windows), 1) - 1
    return [min(window.room, most) for window in windows]


@dataclass(frozen=True)
class Drafts:
    """What the drafter proposes for some windows, in their order.

    Attributes:
        tokens: one list per window, perhaps empty.
    """

    tokens: list[list[int]]

    def of(self, windows: Sequence[int]) -> "Drafts":
        """Those of some of the windows, by their positions."""
        return Drafts([self.tokens[i] for i in windows])

    def trimmed(self, rooms: Sequence[int]) -> "Drafts":
        """As many as fit into the windows with a token of the slim tier behind them."""
        return Drafts([d[: max(room - 1, 0)] for d, room in zip(self.tokens, rooms, strict=True)])


@dataclass(frozen=True)
class SlimDraws:
    """What the slim verifier draws in a pass over some windows, whose T rows are [last token,
    drafts] of each in turn.

    Attributes:
        tokens: [T] int64 on the host, its draw behind each row.
        confidences: [T], `max q'` behind each row, at temperature 1.
        shares: [T] float32 on the host, `q'(v) / max q'` of the draft v that follows a row, and 0
            behind the last; None where no window is under the paper's rule.
    """

    tokens: torch.Tensor
    confidences: Sequence[float]
    shares: torch.Tensor | None = None


def extend(windows: Sequence[Window], drafts: Drafts, draws: SlimDraws, found: Checked) -> None:
    """Adds to each window what its check left, and closes those that are done."""
    accepted, token, tiers = found.accepted.tolist(), found.token.tolist(), found.tiers.tolist()
    first = 0
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
        window.drafted += [place < accepted[row] for place in range(len(new))]
        window.confidences += draws.confidences[first : first + len(new)]
        first += len(drafts.tokens[row]) + 1
        window.tiers += kinds if window.is_paper else [ACCEPT] * len(new)
        window.rounds += 1
        for of_tokens in (
            window.tokens,
            window.tiers,
            window.confidences,
            window.drafted,
        ):
            del of_tokens[window.limit :]
        window.is_open = (
            bool(new)
            and window.room > 0
            and window.stop_tokens.isdisjoint(new)
            and not (window.is_paper and ESCALATE in kinds)
        )
