# SPDX-License-Identifier: Apache-2.0
"""Formulas of the planner: the tokens that a step is expected to bring, and the seconds that it
takes, under every plan. The tiers are those of arXiv:2606.12243; this model of them is ours.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

# The largest acceptance rate that formulas see. They divide by 1 - a, which is still exact to 7
# digits here.
MAX_RATE = 1 - 1e-8

# The rule of a request: no slim tier; slim tokens are drafts for the full model; the slim tokens
# that do not escalate are final.
OFF, LOSSLESS, PAPER = "off", "lossless", "paper"
# Kinds of plan: plain decoding, plain speculative decoding, windows of the slim tier.
NONE, PLAIN, TIERED = "none", "plain", "tiered"


@dataclass(frozen=True)
class DraftPlan:
    """What one step does.

    Attributes:
        num_draft_tokens: most tokens that the drafter proposes for a request at a time. With 0 the
            slim verifier drafts for itself, a token a round.
        rounds: most rounds of drafting and slim verification before the full model verifies. With
            0 the drafts go straight to the full model.
    """

    num_draft_tokens: int
    rounds: int

    @property
    def kind(self) -> str:
        return TIERED if self.rounds else PLAIN if self.num_draft_tokens else NONE

    @property
    def cell(self) -> tuple[int, int]:
        """Its index in the arrays of `forecast_plans`."""
        return self.num_draft_tokens, self.rounds


@dataclass(frozen=True)
class AcceptanceRates:
    """Probabilities per token of the B requests of a batch, `[B]` float64 each.

    Attributes:
        accept_full: the full model accepts a draft token.
        accept_slim: the slim verifier accepts a draft token. Under the paper's rule: it does not
            replace the token by one of its own.
        accept_window: the full model accepts a token of a window.
        kept_rate: a token of a window does not escalate. 1 under the lossless rule.
        hit_rate: draft tokens that the drafter returns, as a share of those requested. An n-gram
            drafter often returns none.
        hit_rate_later: the same in all rounds of a window but the first. Where an n-gram was found,
            the next one usually is found, too.
        adds_bonus_token: 1 where a round whose drafts were all accepted ends with one more token of
            the slim verifier; 0 under the paper's rule.
        weight: the number of requests that each of the B represents.
    """

    accept_full: np.ndarray
    accept_slim: np.ndarray
    accept_window: np.ndarray
    kept_rate: np.ndarray
    hit_rate: np.ndarray
    hit_rate_later: np.ndarray
    adds_bonus_token: np.ndarray
    weight: float = 1.0

    def in_later_rounds(self) -> "AcceptanceRates":
        """The rates in all rounds of a window but the first."""
        return replace(self, hit_rate=self.hit_rate_later)


class PassTimeCurve:
    """Seconds of a pass by its size: linear between known points, constant below the first.

    Beyond the last point the curve continues with the mean slope of all points, if the largest size
    is at least twice the smallest. Otherwise it is constant: a size that was never tried has to
    look cheap enough to be tried.
    """

    def __init__(self, sizes: Sequence[float], seconds: Sequence[float]) -> None:
        self._sizes, self._seconds, self._slope = np.array(sizes), np.array(seconds), 0.0
        if sizes[-1] >= 2 * sizes[0] and sizes[-1] > 0:
            self._slope = (seconds[-1] - seconds[0]) / (sizes[-1] - sizes[0])

    def completed_by(self, other: "PassTimeCurve") -> "PassTimeCurve":
        """With the shape of another curve below and above the sizes that were seen. Above, where
        this curve promises more than that, it stands."""
        found, share = copy(self), self._seconds[-1] / other(self._sizes[-1])
        smaller = other._sizes[other._sizes < self._sizes[0]]
        larger = other._sizes[other._sizes > self._sizes[-1]]
        below = self._seconds[0] * other(smaller) / other(self._sizes[0])
        above = np.minimum(share * other(larger), self(larger))
        found._sizes = np.concatenate([smaller, self._sizes, larger])
        found._seconds = np.concatenate([below, self._seconds, above])
        found._slope = min(self._slope, share * other._slope)
        return found

    def __call__(self, sizes: Any) -> Any:
        """Seconds, in the shape of `sizes`."""
        beyond = np.maximum(np.asarray(sizes) - self._sizes[-1], 0.0)
        return np.interp(sizes, self._sizes, self._seconds) + self._slope * beyond


@dataclass(frozen=True)
class StepTimes:
    """Seconds of the parts of a step.

    Attributes:
        draft: `[D + 1]` float64, one call of the drafter for 0..D draft tokens per request.
        draft_later: the same in all rounds of a window but the first, if it is not the same: 0
            for a drafter that answers once per window.
        slim: one pass of the slim verifier, by its rows.
        full: one pass of the full model, by its rows.
        overhead: everything else, once per pass of the full model.
    """

    draft: np.ndarray
    slim: PassTimeCurve
    full: PassTimeCurve
    overhead: float = 0.0
    draft_later: np.ndarray | None = None

    @property
    def max_draft_tokens(self) -> int:
        return len(self.draft) - 1

    def draft_in_round(self, rounds_done: int) -> np.ndarray:
        """`[D + 1]`, one call of the drafter after so many rounds of a window."""
        is_first = rounds_done == 0 or self.draft_later is None
        return self.draft if is_first else np.asarray(self.draft_later)


@dataclass(frozen=True)
class BackgroundLoad:
    """Requests of the batch that do not use the slim tier. They still wait until it is done.

    Attributes:
        tokens, rows: `[D + 1]` float64, the tokens that they get and the rows that they add to the
            full model's pass, in a step with 0..D draft tokens.
    """

    tokens: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(
        cls, drafted: AcceptanceRates | None, max_draft_tokens: int, num_undrafted: int = 0
    ) -> "BackgroundLoad":
        """Requests that get plain drafts, if there are any, and `num_undrafted` without drafts."""
        base = np.full(max_draft_tokens + 1, float(num_undrafted))
        if drafted is None:
            return cls(base, base)
        tokens, rows = plain_step(drafted, max_draft_tokens)
        return cls(base + tokens, base + rows)


@dataclass(frozen=True)
class Forecast:
    """Expected values of one step, by plan.

    Attributes:
        tokens: of all requests together.
        seconds: in the same shape.
    """

    tokens: np.ndarray
    seconds: np.ndarray

    @property
    def rates(self) -> np.ndarray:
        """Tokens per second."""
        return self.tokens / self.seconds


def forecast_plans(
    rates: AcceptanceRates,
    times: StepTimes,
    max_window: int,
    max_rounds: int,
    background: BackgroundLoad | None = None,
    with_tier: bool = True,
) -> Forecast:
    """`[D + 1, R + 1]`: every plan of 0..D draft tokens and 0..R rounds.

    Impossible plans, those without the tier among them if it is not allowed, bring 0 tokens.
    """
    plain = forecast_plain(rates, times, background)
    shape = times.max_draft_tokens + 1, max_rounds + 1
    tokens, seconds = np.zeros(shape), np.full(shape, plain.seconds.max())
    tokens[:, 0], seconds[:, 0] = plain.tokens, plain.seconds
    if with_tier:
        tiered = forecast_tiered(rates, times, max_window, max_rounds, background)
        tokens[:, 1:], seconds[:, 1:] = tiered.tokens, tiered.seconds
    return Forecast(tokens, seconds)


# --- Plain drafts ---------------------------------------------------------------------------------


def plain_step(rates: AcceptanceRates, max_draft_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """A step whose 0..D draft tokens go straight to the full model.

    With hit rate h_i and acceptance rate a_i of request i:

        tokens = sum_i (1 + h_i (a_i + ... + a_i^d))
        rows   = sum_i (1 + d h_i)

    Returns:
        tokens and rows of the full pass, `[D + 1]` each.
    """
    drafts, h = np.arange(max_draft_tokens + 1), rates.hit_rate[:, None]
    tokens = 1 + h * (round_length(rates.accept_full[:, None], drafts) - 1)
    return rates.weight * tokens.sum(0), rates.weight * (len(h) + drafts * h.sum())


def forecast_plain(
    rates: AcceptanceRates, times: StepTimes, background: BackgroundLoad | None = None
) -> Forecast:
    """`[D + 1]`: plain speculative decoding with 0..D draft tokens, plain decoding first.

    seconds = draft(d) + full(rows) + overhead
    """
    tokens, rows = plain_step(rates, times.max_draft_tokens)
    background = background or BackgroundLoad.of(None, times.max_draft_tokens)
    seconds = times.draft + times.full(rows + background.rows) + times.overhead
    return Forecast(tokens + background.tokens, seconds)


# --- Windows of the slim tier ---------------------------------------------------------------------


def round_length(accept: Any, num_draft_tokens: Any, bonus: Any = 1.0) -> Any:
    """Expected tokens of one check of d drafts, each accepted with probability a.

        1 + a + ... + a^(d-1) + bonus a^d

    The checker's own token, which replaces the first rejected draft, is among them.

    Args:
        accept: a; num_draft_tokens: d.
        bonus: 1 if the checker adds a token behind d accepted drafts, else 0.
    """
    a, d = np.minimum(accept, MAX_RATE), num_draft_tokens
    return (1 - a**d) / (1 - a) + bonus * a**d


def round_survival(accept: Any, survive: Any, num_draft_tokens: Any, bonus: Any = 1.0) -> Any:
    """`E[s^n]`: the probability that all n tokens of a round survive, each with probability s.

    A round has n = k + 1 tokens with probability (1 - a) a^k for k < d, and d + bonus tokens with
    probability a^d. Hence

        E[s^n] = s (1 - a) (1 - (a s)^d) / (1 - a s) + (a s)^d s^bonus

    Args:
        survive: s; accept, num_draft_tokens, bonus: as in `round_length`.
    """
    a, s = accept, np.minimum(survive, MAX_RATE)
    both = (a * s) ** num_draft_tokens
    return s * (1 - a) * (1 - both) / (1 - a * s) + both * s**bonus


@dataclass(frozen=True)
class Round:
    """Expected values of a round, `[B, D + 1]` for 0..D draft tokens.

    Attributes:
        length: tokens that it adds to a window.
        accepted: those of them that the full model accepts, if it accepted all before them.
    """

    length: np.ndarray
    accepted: np.ndarray


def one_round(rates: AcceptanceRates, num_draft_tokens: np.ndarray) -> Round:
    """A request has drafts with probability h. Without them the round brings the slim verifier's
    token only, and under the paper's rule nothing. With n tokens in the round:

        accepted = E[s + ... + s^n] = s (1 - E[s^n]) / (1 - s)
    """
    columns = (rates.accept_slim, rates.accept_window, rates.hit_rate, rates.adds_bonus_token)
    a, s, h, bonus = (column[:, None] for column in columns)
    s = np.minimum(s, MAX_RATE)
    survival = h * round_survival(a, s, num_draft_tokens, bonus) + (1 - h) * s**bonus
    return Round(
        length=h * round_length(a, num_draft_tokens, bonus) + (1 - h) * bonus,
        accepted=s * (1 - survival) / (1 - s),
    )


def forecast_tiered(
    rates: AcceptanceRates,
    times: StepTimes,
    max_window: int,
    max_rounds: int,
    background: BackgroundLoad | None = None,
) -> Forecast:
    """`[D + 1, R]`: windows of at most 1..R rounds with 0..D draft tokens each.

    o_r(w) is the probability that a window is open and has w tokens after r rounds. open_r and
    round_r are the probabilities that at least one window is open before round r + 1, and that it
    has that round: under the paper's rule only with drafts. s is `accept_window`; under that rule
    s^w below is 1, because windows with an escalated token do not go on.

        o_(r+1)(w') = sum_w o_r(w) P(n = w' - w) kept_rate^(w' - w)
        tokens      = sum_i (1 + sum_r sum_w o_r(w) s^w accepted)
        seconds     = sum_r (open_r draft(d) + round_r slim(rows)) + full(rows) + overhead

    Args:
        max_window: most tokens between two passes of the full model. Every round ends with a token
            of the slim verifier, for which drafts leave room.
        background: requests that have drafts but no rounds, or neither.
    """
    most = times.max_draft_tokens
    background = background or BackgroundLoad.of(None, most)
    # Lengths of open windows. With one round there is only the empty window before it.
    lengths = np.arange(max_window if max_rounds > 1 else 1)
    first, later = (
        _round_transitions(each, most, max_window, lengths)
        for each in (rates, rates.in_later_rounds())
    )
    state = np.zeros((len(rates.accept_window), most + 1, 1, len(lengths)))
    state[..., :1] = 1.0
    of_rounds = []
    for done in range(max_rounds):
        moves, brings = later if done else first
        of_rounds.append((state @ brings)[..., 0, :])
        state = state @ moves
    # [B, D + 1, R]
    accepted, window, is_open, has_round, rows = np.moveaxis(np.stack(of_rounds, axis=2), -1, 0)
    tokens = 1 + np.cumsum(accepted, axis=2)
    windows = np.cumsum(window, axis=2).sum(0)
    any_open, any_round = (
        1 - np.prod(np.clip(1 - each, 0, 1), axis=0) ** rates.weight  # [D + 1, R]
        for each in (is_open, has_round)
    )
    slim = times.slim(rates.weight * rows.sum(0) / np.maximum(any_round, 1e-9))
    draft = np.stack([times.draft_in_round(done) for done in range(max_rounds)], axis=1)
    rounds = any_open * draft + any_round * slim
    full = times.full(rates.weight * (len(tokens) + windows) + background.rows[:, None])
    seconds = np.cumsum(rounds, axis=1) + full + times.overhead
    return Forecast(rates.weight * tokens.sum(0) + background.tokens[:, None], seconds)


def _round_transitions(
    rates: AcceptanceRates, most: int, max_window: int, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """One round with 0..D draft tokens, of windows that have each of L lengths before it.

    Returns:
        `[B, D + 1, L, L]`, the probability of each length after it, if the window stays open; and
        `[B, D + 1, L, 5]`: tokens that the full model accepts, tokens, 1 for the window itself,
        the probability that it has the round, and rows of the slim pass.
    """
    drafts = np.arange(most + 1)
    per_round = one_round(rates, drafts)
    # Drafts that a window has room for.
    fits = np.minimum(drafts[:, None], max_window - 1 - lengths)  # [D + 1, L]
    added = lengths - lengths[:, None]  # [L, L]
    probs = _round_length_probs(rates, drafts, max_window)[:, fits]  # [B, D + 1, L, W + 1]
    before = np.arange(len(lengths))[:, None]
    moves = np.where(added >= 0, probs[:, :, before, np.maximum(added, 0)], 0.0)
    survives = np.where(rates.adds_bonus_token > 0, rates.accept_window, 1.0)
    h, bonus = rates.hit_rate[:, None, None], rates.adds_bonus_token[:, None, None]
    has_round = np.where(bonus > 0, 1.0, h * (fits > 0))
    # A window without a round does not go on.
    moves = moves * (has_round > 0)[..., None]
    brings = np.stack(
        [
            survives[:, None, None] ** lengths * per_round.accepted[:, fits],
            per_round.length[:, fits],
            np.ones_like(per_round.length[:, fits]),
            has_round,
            has_round + fits * h,
        ],
        axis=-1,
    )
    return moves, brings


def _round_length_probs(rates: AcceptanceRates, drafts: np.ndarray, longest: int) -> np.ndarray:
    """`[B, D + 1, W + 1]`: the probability that a round adds n tokens and none of them
    escalates."""
    a = rates.accept_slim[:, None, None]
    h = rates.hit_rate[:, None, None]
    n, d = np.arange(longest + 1), drafts[:, None]
    bonus = rates.adds_bonus_token[:, None, None]
    probs = np.where((n >= 1) & (n <= d), a ** np.maximum(n - 1, 0) * (1 - a), 0.0)
    probs = h * (probs + np.where(n == d + bonus, a**d, 0.0)) + (1 - h) * (n == 1) * bonus
    return probs * np.where(bonus > 0, 1.0, rates.kept_rate[:, None, None] ** n)
