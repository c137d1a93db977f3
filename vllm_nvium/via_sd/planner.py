# SPDX-License-Identifier: Apache-2.0
"""How many drafts and how many rounds of slim checks the next window gets, or none of either, from
measured pass times and acceptances (the tiers are those of arXiv:2606.12243, the choice is ours).
It promises that the slim tier costs little where it does not pay: everything is tried now and then,
and what the trials lose stays within a budget.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from math import exp, log
from statistics import median_low
from typing import Any

import numpy as np

# Beyond this an acceptance is as good as 1, and 1 / (1 - s) is still exact to 7 digits.
LARGEST_ACCEPTANCE = 1 - 1e-8

# What a request allows: no slim tier, slim tokens as drafts, slim tokens that are kept unasked.
OFF, LOSSLESS, PAPER = "off", "lossless", "paper"

# --- What a step brings ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """One step.

    Attributes:
        drafts: most tokens that the drafter proposes at a time, for each request.
        rounds: most rounds of drafts and slim checks before the full model is asked. 0: the drafts
            go straight to the full model.
    """

    drafts: int
    rounds: int


@dataclass(frozen=True)
class Acceptance:
    """Chances of the B requests of a batch, `[B]` float64 each.

    Attributes:
        at_full: the full model accepts a draft.
        at_slim: the slim verifier accepts a draft; under the paper's rule, does not draw it again.
        slim: the full model accepts a token of a window.
        stays: such a token does not escalate; 1 where the rule is lossless.
        obtained: drafts obtained, as a share of those asked for: n-grams often find none.
        again: the same in the rounds of a window after its first: where an n-gram was found, the
            next one mostly is too.
        own: 1 where the slim verifier adds a token of its own behind drafts that it all accepts;
            0 under the paper's rule.
        weight: how many requests each of the B stands for.
    """

    at_full: np.ndarray
    at_slim: np.ndarray
    slim: np.ndarray
    stays: np.ndarray
    obtained: np.ndarray
    again: np.ndarray
    own: np.ndarray
    weight: float = 1.0

    @property
    def found(self) -> float:
        """The chance that the drafter finds drafts of any request."""
        return float(1 - np.prod(1 - self.obtained) ** self.weight)

    def later(self) -> "Acceptance":
        """Of the rounds of a window after its first."""
        return replace(self, obtained=self.again)


class Curve:
    """Seconds of a pass by its size: linear between known points, flat below the first.

    Beyond the last it goes on with the mean slope of all, once they span a factor of two, and is
    flat before: what was never tried must look cheap enough to be tried.
    """

    def __init__(self, sizes: Sequence[float], seconds: Sequence[float]) -> None:
        far = 2.0 * sizes[-1] + 1024.0
        slope = 0.0
        if sizes[-1] >= 2 * sizes[0] and sizes[-1] > 0:
            slope = (seconds[-1] - seconds[0]) / (sizes[-1] - sizes[0])
        self._sizes = np.array([*sizes, far])
        self._seconds = np.array([*seconds, seconds[-1] + slope * (far - sizes[-1])])
        self.points = dict(zip(sizes, seconds, strict=True))

    def __call__(self, sizes: Any) -> Any:
        """Seconds, in the shape of `sizes`."""
        return np.interp(sizes, self._sizes, self._seconds)


@dataclass(frozen=True)
class Times:
    """Seconds of wall clock.

    Attributes:
        draft: `[D + 1]` float64, one call of the drafter for 0..D drafts per request.
        slim: one pass of the slim verifier, by its rows.
        full: one pass of the full model, by its rows.
        overhead: everything else in a step, once per full pass.
    """

    draft: np.ndarray
    slim: Curve
    full: Curve
    overhead: float = 0.0


@dataclass(frozen=True)
class Beside:
    """Requests that decode in the same steps without the tier: they wait for it all the same.

    Attributes:
        tokens, rows: `[D + 1]` float64, of a step with 0..D drafts; rows are the full model's.
    """

    tokens: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(cls, accept: Acceptance | None, most: int, others: int = 0) -> "Beside":
        """Those with plain drafts, if any, and others that get none and bring a token each."""
        nobody = np.full(most + 1, float(others))
        if accept is None:
            return cls(nobody, nobody)
        tokens, rows = plain_drafts(accept, most)
        return cls(nobody + tokens, nobody + rows)


@dataclass(frozen=True)
class Outlook:
    """What plans would bring, on the mean; arrays of one shape.

    Attributes:
        tokens: of one step, all requests together.
        seconds: of one step.
    """

    tokens: np.ndarray
    seconds: np.ndarray

    @property
    def rates(self) -> np.ndarray:
        """Tokens per second."""
        return self.tokens / self.seconds


def round_length(accept: Any, drafts: Any, own: Any = 1.0) -> Any:
    """Mean tokens of one check of `d` drafts; the checker's own token is among them.

        1 + a + ... + a^(d-1) + own a^d

    Args:
        accept: `a`, per token; drafts: `d`.
        own: whether the checker adds a token behind drafts that it all accepts.
    """
    a = np.minimum(accept, LARGEST_ACCEPTANCE)
    return (1 - a**drafts) / (1 - a) + own * a**drafts


def round_survival(accept: Any, keep: Any, drafts: Any, own: Any = 1.0) -> Any:
    """The chance that something with chance `s` happens to every token of a round.

    A round has length `P(L = k + 1) = (1 - a) a^k` for k < d, and `P(L = d + own) = a^d`:

        E[s^L] = s (1 - a) (1 - (a s)^d) / (1 - a s) + (a s)^d s^own

    Args:
        accept, drafts, own: as in `round_length`; keep: `s`.
    """
    a, s = accept, np.minimum(keep, LARGEST_ACCEPTANCE)
    both = (a * s) ** drafts
    return s * (1 - a) * (1 - both) / (1 - a * s) + both * s**own


def plain_drafts(accept: Acceptance, most: int) -> tuple[np.ndarray, np.ndarray]:
    """`[D + 1]` each, tokens of a step and rows of its full pass where 0..D drafts go straight to
    the full model.

        tokens  sum_i (1 + h_i (a_i + ... + a_i^d))
        rows    sum_i (1 + d h_i)
    """
    drafts, h = np.arange(most + 1), accept.obtained[:, None]
    tokens = 1 + h * (round_length(accept.at_full[:, None], drafts) - 1)
    return accept.weight * tokens.sum(0), accept.weight * (len(h) + drafts * h.sum())


def plain_outlook(accept: Acceptance, times: Times, beside: Beside | None = None) -> Outlook:
    """`[D + 1]`: plain speculative decoding with 0..D drafts.

    tokens in draft(d) + full(rows) + overhead, those of `beside` included
    """
    most = len(times.draft) - 1
    tokens, rows = plain_drafts(accept, most)
    beside = beside or Beside.of(None, most)
    seconds = times.draft + times.full(rows + beside.rows) + times.overhead
    return Outlook(tokens + beside.tokens, seconds)


@dataclass(frozen=True)
class Round:
    """A round that takes place, on the mean; `[B, D]` for 1..D drafts.

    Attributes:
        length: tokens that it adds to a window.
        kept: those of them that the full model accepts, if it accepted all before.
    """

    length: np.ndarray
    kept: np.ndarray


def one_round(accept: Acceptance, drafts: np.ndarray) -> Round:
    """With n its tokens, a round takes place where somebody's drafts were found, chance P; of those
    rounds a request has drafts of its own in h / P, and else only the slim verifier's token.

        kept = E[s + ... + s^n] = s (1 - E[s^n]) / (1 - s)
    """
    columns = (accept.at_slim, accept.slim, accept.obtained, accept.own)
    a, s, h, own = (column[:, None] for column in columns)
    s = np.minimum(s, LARGEST_ACCEPTANCE)
    h = h / max(accept.found, 1e-9)
    survival = h * round_survival(a, s, drafts, own) + (1 - h) * s**own
    return Round(
        length=h * round_length(a, drafts, own) + (1 - h) * own,
        kept=s * (1 - survival) / (1 - s),
    )


def tiered_outlook(
    accept: Acceptance,
    times: Times,
    max_window: int,
    max_rounds: int,
    beside: Beside | None = None,
) -> Outlook:
    """`[D, R]`: windows of 1..R rounds with 1..D drafts each.

    With Q_r the product of the first r P of `one_round` (of the first round and of later ones), the
    chance that round r takes place, `o_r(w)` the chance that after r rounds a window is still open
    and w tokens long, and `safe` the chance that such a token does not fail (1 under the paper's
    rule, where only windows without escalated tokens go on):

        o_(r+1)(w') = sum_w o_r(w) P(n = w' - w) stays^(w' - w)
        tokens      sum_i (1 + sum_r Q_(r+1) sum_w o_r(w) safe^w kept)
        seconds     sum_r (Q_r draft(d) + Q_(r+1) slim(rows)) somebody_r + full(rows) + overhead

    Args:
        max_window: most tokens between two full passes. The slim verifier's own token ends a
            round, so that a window with room for one token is full.
        beside: requests that get the same number of drafts, or none, and no rounds.
    """
    most = len(times.draft) - 1
    beside = beside or Beside.of(None, most)
    # A window of one round is empty before it, and nobody asks what follows.
    lengths = np.arange(max(max_window - 1, 0) if max_rounds > 1 else min(max_window - 1, 1))
    first, later = (
        _moves_of_a_round(each, most, max_window, lengths) for each in (accept, accept.later())
    )
    state = np.zeros((len(accept.slim), most, 1, len(lengths)))
    state[..., :1] = 1.0
    of_rounds = []
    for done in range(max_rounds):
        moves, brings = later if done else first
        of_rounds.append((state @ brings)[..., 0, :])
        state = state @ moves
    kept, window, is_open, rows = np.moveaxis(np.stack(of_rounds, axis=2), -1, 0)  # [B, D, R] each
    places = accept.found * accept.later().found ** np.arange(max_rounds)  # [R]
    asked = np.concatenate([[1.0], places[:-1]])
    tokens = 1 + np.cumsum(places * kept, axis=2)
    windows = np.cumsum(places * window, axis=2).sum(0)
    somebody = 1 - np.prod(np.clip(1 - is_open, 0, 1), axis=0) ** accept.weight  # [D, R]
    slim = times.slim(accept.weight * rows.sum(0) / np.maximum(somebody, 1e-9))
    rounds = somebody * (asked * times.draft[1:, None] + places * slim)
    full = times.full(accept.weight * (len(tokens) + windows) + beside.rows[1:, None])
    seconds = np.cumsum(rounds, axis=1) + full + times.overhead
    return Outlook(accept.weight * tokens.sum(0) + beside.tokens[1:, None], seconds)


def _moves_of_a_round(
    accept: Acceptance, most: int, max_window: int, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A round that takes place in a window of L = `lengths` tokens, at most max_window - 2, with
    D = 1..`most` drafts.

    Returns:
        `[B, D, L, L]`, chances of the lengths that leave the window open; and `[B, D, L, 4]`:
        tokens that the full model keeps, tokens, 1 (the window is there), and rows of the pass.
    """
    drafts = np.arange(1, most + 1)
    per_round = one_round(accept, drafts)
    # Which number of drafts fits into a window of each length, less 1.
    fits = np.minimum(drafts[:, None], max_window - 1 - lengths) - 1  # [D, L]
    added = lengths - lengths[:, None]  # [L, L]
    chances = _length_chances(accept, drafts, max_window)[:, fits]  # [B, D, L, W + 1]
    rows = np.arange(len(lengths))[:, None]
    moves = np.where(added >= 0, chances[:, :, rows, np.maximum(added, 0)], 0.0)
    safe = np.where(accept.own > 0, accept.slim, 1.0)[:, None, None] ** lengths
    brings = np.stack(
        [
            safe * per_round.kept[:, fits],
            per_round.length[:, fits],
            np.ones_like(per_round.length[:, fits]),
            1 + (fits + 1) * (accept.obtained / max(accept.found, 1e-9))[:, None, None],
        ],
        axis=-1,
    )
    return moves, brings


def _length_chances(accept: Acceptance, drafts: np.ndarray, longest: int) -> np.ndarray:
    """`[B, D, W + 1]`: how many tokens a round adds, if none of them escalates."""
    a, h = accept.at_slim[:, None, None], (accept.obtained / max(accept.found, 1e-9))[:, None, None]
    n, d = np.arange(longest + 1), drafts[:, None]
    own = accept.own[:, None, None]
    chances = np.where((n >= 1) & (n <= d), a ** np.maximum(n - 1, 0) * (1 - a), 0.0)
    chances = h * (chances + np.where(n == d + own, a**d, 0.0)) + (1 - h) * (n == 1) * own
    return chances * np.where(own > 0, 1.0, accept.stays[:, None, None] ** n)


# --- What was seen --------------------------------------------------------------------------------


class PassTimes:
    """Seconds of one kind of pass by size: medians, so that a few slow passes change nothing.

    Args:
        keep: samples of sizes that share a median.
        enough: a median counts from so many samples.
        memory: sizes not seen for so many steps are forgotten while others are seen.
        middle: what stands for the samples of a size.
    """

    def __init__(
        self,
        keep: int = 15,
        enough: int = 5,
        memory: int = 2000,
        middle: Callable[[Sequence[float]], float] = median_low,
    ) -> None:
        self.keep, self.enough, self.memory, self.middle = keep, enough, memory, middle
        self._samples: dict[int, deque[tuple[int, float]]] = {}
        self._seen: dict[int, int] = {}

    def saw(self, size: int, seconds: float, step: int) -> None:
        """A pass of that size took so long, in step number `step`."""
        bucket = _bucket(size)
        if bucket not in self._samples:
            self._samples[bucket] = deque(maxlen=self.keep)
        self._samples[bucket].append((size, seconds))
        self._seen[bucket] = step

    def points(self) -> list[tuple[float, float]]:
        """Sizes and seconds, neither ever falling; empty before the first pass."""
        newest = max(self._seen.values(), default=0)
        for bucket in [b for b, step in self._seen.items() if newest - step > self.memory]:
            del self._seen[bucket], self._samples[bucket]
        groups = [list(group) for _, group in sorted(self._samples.items())]
        if groups:
            groups = [g for g in groups if len(g) >= self.enough] or [sum(groups, [])]
        found: list[tuple[int, float, float]] = []  # samples, size, seconds
        for group in groups:
            sizes, seconds = zip(*group, strict=True)
            # The median time is that of the median size, and not of the mean one (and the mean time
            # that of the mean size).
            count, size, second = len(group), float(self.middle(sizes)), self.middle(seconds)
            # A larger pass that seems faster than a smaller one: both at their mean.
            while found and second < found[-1][2]:
                other = found.pop()
                total = count + other[0]
                size = (size * count + other[1] * other[0]) / total
                second = (second * count + other[2] * other[0]) / total
                count = total
            found.append((count, size, second))
        return [(size, second) for _, size, second in found]

    def curve(self) -> Curve | None:
        """What is known by now; None before the first pass."""
        points = self.points()
        return Curve(*zip(*points, strict=True)) if points else None


def _bucket(size: int) -> int:
    """Sizes with the same three leading bits share a median: sizes that differ much must not,
    because half of one and half of another have the median of neither."""
    shift = max(size.bit_length() - 3, 0)
    return size >> shift << shift


class Pace:
    """How slow the machine is at present, as a multiple of its usual time: from the passes of the
    full model, of which there are some at all times.

    A machine that gets slower gets slower for all passes, but not all kinds of them are seen at any
    time: what was seen in a slow moment must not be held against what is seen in a fast one.

    Args:
        keep: passes whose median is the present.
        enough: passes of a size that make it known.
        memory: passes of a size whose median is usual. They count for what they would have taken at
            the usual pace, or what is usual would follow every moment.
        steady: a pace that differs by less is taken for noise. Without it the noise of small sizes
            would stay in what is usual of them.
    """

    def __init__(
        self, keep: int = 7, enough: int = 5, memory: int = 101, steady: float = 0.1
    ) -> None:
        self.enough, self.memory, self.steady = enough, memory, steady
        self._last: deque[float] = deque(maxlen=keep)
        self._usual: dict[int, deque[float]] = {}
        self.now = 1.0

    def saw(self, size: int, seconds: float) -> None:
        """A pass of the full model."""
        usual = self._usual.setdefault(_bucket(size), deque(maxlen=self.memory))
        if len(usual) >= self.enough:
            self._last.append(seconds / max(median_low(usual), 1e-9))
            pace = median_low(self._last)
            self.now = 1.0 if abs(pace - 1) < self.steady else pace
        usual.append(seconds / self.now)


@dataclass(slots=True)
class Share:
    """A chance per trial, from counts that fade: a long memory, and a short one that replaces it
    when the two cannot be about the same chance any more.

    Attributes:
        good, all: of the long memory; new_good, new_all: of the short one.
    """

    good: float = 0.0
    all: float = 0.0
    new_good: float = 0.0
    new_all: float = 0.0

    def saw(self, good: float, bad: float) -> None:
        """Trials with known outcome. A check that stops at its first failure has at most one bad
        one; drafts behind it were not tried, and what was not tried does not count."""
        count = good + bad
        keep = max(1 - count / MEMORY, 0.0)
        self.good, self.all = self.good * keep + good, self.all * keep + count
        keep = max(1 - count / SHORT_MEMORY, 0.0)
        self.new_good, self.new_all = self.new_good * keep + good, self.new_all * keep + count
        older = max(self.all - self.new_all, 0.0) + 2
        usual = min(max((self.good - self.new_good + 1) / older, 0.01), 0.99)
        off = self.new_good - usual * self.new_all
        variance = usual * (1 - usual) * self.new_all * (1 + self.new_all / older)
        if off * off > SURPRISE**2 * variance:
            self.good, self.all = self.new_good, self.new_all

    def fade(self, keep: float) -> None:
        """Makes what comes next count for more."""
        self.good, self.all = self.good * keep, self.all * keep

    def estimate(self, prior: float, trials: float) -> float:
        """With a belief that is worth so many trials."""
        return (self.good + prior * trials) / (self.all + trials)


@dataclass(slots=True)
class Shares:
    """The counts behind an `Acceptance`, of one request or of all with the same rule."""

    rule: str = LOSSLESS
    is_greedy: bool = False
    at_full: Share = field(default_factory=Share)
    at_slim: Share = field(default_factory=Share)
    slim: Share = field(default_factory=Share)
    stays: Share = field(default_factory=Share)
    obtained: Share = field(default_factory=Share)
    again: Share = field(default_factory=Share)


KINDS = tuple(each.name for each in fields(Shares) if each.type is Share)


def judged_drafts(drafted: int, kept: int, proposed: int, accepted: int) -> tuple[int, int]:
    """What a window, verified greedily, tells of the full model's opinion on the drafts that it
    opened with, as if they had gone to the full model at once.

    The window is the `kept` drafts, then a token of the slim verifier. Where the full model takes
    that token, it would have refused the draft in its place; where it takes neither, nobody knows.
    Without this the two kinds of plan would be compared by different stretches of text.

    Args:
        drafted: drafts of the first round; kept: those that the slim verifier kept.
        proposed: tokens of the window that the full model saw; accepted: of those, in order.

    Returns:
        drafts that it accepts, and 1 if it refuses the next, else 0.
    """
    seen = min(kept, proposed)
    if accepted < seen:
        return accepted, 1
    return seen, int(accepted > kept and kept < drafted)


# --- What is done ---------------------------------------------------------------------------------

# Trials that the memories of a share hold, and standard deviations between them that are too many.
MEMORY, SHORT_MEMORY, SURPRISE = 2000.0, 50.0, 3.0
# What is believed before the first trial, and how many trials that belief is worth.
PRIOR = {
    "at_full": 0.6, "at_slim": 0.6, "slim": 0.8, "stays": 0.9, "obtained": 0.9, "again": 0.9,
}  # fmt: skip
PRIOR_TRIALS = 2.0
# What says something about another chance, by rule, and how many trials it is worth at most. The
# slim verifier is most of the full model: what one makes of drafts says how the other may judge;
# but under the paper's rule it keeps nearly all drafts, and leaves the others to the full model.
AGAIN = {"again": ("obtained", 25.0)}
ALIKE = {
    LOSSLESS: {"at_full": ("at_slim", 100.0), "at_slim": ("at_full", 100.0)} | AGAIN,
    PAPER: AGAIN,
    OFF: AGAIN,
}
# How many trials the share of all requests is worth for one of them.
COMMON_TRIALS = 16.0
# A request whose drafts one of them takes to more often than others' pleases the other more, too:
# so much of the difference in log-odds is believed before that one was asked.
TOGETHER, BELIEVED = {"at_full": "at_slim", "at_slim": "at_full"}, 0.5
# Kinds of plan, and what must be known before each is used, from so many trials.
NONE, PLAIN, TIERED = range(3)
NEEDS = {NONE: (), PLAIN: ("at_full",), TIERED: ("at_slim", "slim")}
ENOUGH_EVIDENCE = 16.0
FIRST_PLANS = {NONE: Plan(0, 0), PLAIN: Plan(4, 0), TIERED: Plan(2, 2)}
# Least steps of a trial, as many as a median needs; most steps of one, and outcomes that end it
# before: the first has to tell the most.
SHORT_TRIAL, FIRST_TRIAL, TRIAL = 5, (15, 30), (8, 24)
# How much of what is known about a kind of plan that is not in use survives its next trial.
TRIAL_FADE = 0.75
# Steps whose time the budget for trials can save up, and owe for trials of what may be the best:
# of what would be, if the acceptances that it needs were better by so many standard errors.
LARGEST_BANK, HOPE = 3, 2.0
# Plain decoding has no acceptance to learn: its trials may be so many times rarer.
SELDOM = 45
# Requests that a plan is made for, at most and at least; in larger batches some stand for all. And
# drafts times window lengths squared times requests of a table that takes a millisecond or two:
# with more of the first two, fewer stand for all and a plan is kept for up to so much longer.
LARGEST_SAMPLE, LEAST_SAMPLE = 8, 4
LARGEST_TABLE, SLOWEST = LARGEST_SAMPLE * 8 * 15**2, 32


class RoundController:
    """Chooses drafts and rounds for the next step from what was seen of the last ones.

    The same calls always give the same plans: there is no clock and no chance in it.

    Args:
        max_drafts: most tokens that the drafter may propose at a time.
        max_window: most tokens between two passes of the full model.
        max_rounds: most rounds in a window; where more would pay, more drafts pay about as much.
        max_batch: no slim tier while more requests than this decode.
        budget: share of the time that trials of what seems worse may lose.
        refresh: steps for which a plan is kept; longer where making one takes long.
        margin: a kind of plan must promise so much more than the one in use to replace it.
        interval: steps between trials of the same kind of plan.
    """

    def __init__(
        self,
        max_drafts: int,
        max_window: int,
        *,
        max_rounds: int = 8,
        max_batch: int | None = None,
        budget: float = 0.01,
        refresh: int = 8,
        margin: float = 0.015,
        interval: int = 40,
    ) -> None:
        self.max_drafts, self.max_window, self.max_batch = max_drafts, max_window, max_batch
        self.max_rounds = min(max_rounds, max_window)
        self.budget, self.refresh, self.margin = budget, refresh, margin
        self.interval = interval
        self._full, self._slim, self._overhead = PassTimes(), PassTimes(), PassTimes()
        self._draft: defaultdict[int, PassTimes] = defaultdict(PassTimes)  # by bits of requests
        self._drafts_for_nothing = False
        self._pace = Pace()
        self._common: defaultdict[str, Shares] = defaultdict(Shares)  # by rule
        self._requests: dict[str, Shares] = {}
        # Drafts that a window opened with, and how many of them the slim verifier kept.
        self._opened: dict[str, tuple[int, int]] = {}
        self._step = 0
        # The plan of this step, and the plan between trials.
        self._plan = self._used = Plan(0, 0)
        # Tokens per second and seconds per step that the latter promises; 0 while nothing is known.
        self._rate = self._seconds = 0.0
        self._times: Times | None = None
        self._found = 1.0
        self._others = 0
        # Requests with drafts and others in the batch that the plan was made for.
        self._planned_for = (0, 0)
        self._beside = Beside.of(None, max_drafts)
        self._next_choice = 0
        self._on_trial = False
        self._trial_steps = self._outcomes = 0
        self._trial_size = FIRST_TRIAL
        self._last_trial: dict[int, int] = {}
        self._bank = 0.0
        self._steps_of = [0, 0, 0]
        self._gains: dict[str, tuple[float, float, float]] = {}

    # Observations.

    def add(self, request_id: str, rule: str, is_greedy: bool = False) -> None:
        """A request that will decode.

        Args:
            rule: `OFF`, `LOSSLESS` or `PAPER`.
            is_greedy: at temperature 0, where one token at most passes each check.
        """
        if request_id not in self._requests:
            self._requests[request_id] = Shares(rule, is_greedy)

    def remove(self, request_id: str) -> None:
        """The request has ended; what it taught about all requests stays."""
        for known in (self._requests, self._gains, self._opened):
            known.pop(request_id, None)

    def saw_full(self, rows: int, seconds: float) -> None:
        """One pass of the full model over newest tokens, windows and drafts, no prompts."""
        self._pace.saw(rows, seconds)
        self._full.saw(rows, self._at_usual_pace(seconds), self._step)

    def saw_slim(self, rows: int, seconds: float) -> None:
        """One pass of the slim verifier and its check."""
        self._slim.saw(rows, self._at_usual_pace(seconds), self._step)

    def saw_draft(self, requests: int, drafts: int, seconds: float) -> None:
        """One call of the drafter, asked for so many drafts of each of so many requests; none where
        it has to see the tokens all the same, as a draft model has for its own KV cache."""
        self._draft[requests.bit_length()].saw(drafts, self._at_usual_pace(seconds), self._step)
        self._drafts_for_nothing |= drafts == 0

    def saw_overhead(self, requests: int, seconds: float) -> None:
        """What a step took beside its passes: scheduling, output."""
        self._overhead.saw(requests, self._at_usual_pace(seconds), self._step)

    def _at_usual_pace(self, seconds: float) -> float:
        return seconds / self._pace.now

    def saw_slim_check(
        self,
        request_id: str,
        asked: int,
        drafted: int,
        accepted: int,
        escalated: int = 0,
        is_first: bool = True,
    ) -> None:
        """The slim verifier's check of one round.

        Args:
            asked: drafts that the drafter was asked for, as far as the window had room.
            drafted: drafts that there were.
            accepted: leading ones that it kept; under the paper's rule, that it did not draw again.
            escalated: under the paper's rule, those of the kept ones that escalate.
            is_first: it is the first of its window.
        """
        self._saw_obtained(request_id, asked, drafted, "obtained" if is_first else "again")
        if is_first:
            self._opened[request_id] = (drafted, accepted)
        self._saw(request_id, "at_slim", accepted, int(accepted < drafted))
        length = accepted + int(accepted < drafted)
        self._saw(request_id, "stays", length - escalated, escalated)

    def saw_full_check(
        self, request_id: str, proposed: int, accepted: int, tiered: bool, asked: int = 0
    ) -> None:
        """The full model's check of a window, or of plain drafts.

        Args:
            proposed: tokens of the window, or drafts.
            accepted: leading ones that it accepted.
            tiered: whether the slim verifier had checked them.
            asked: of plain drafts, as in `saw_slim_check`; 0 where nobody was asked.
        """
        if not tiered:
            self._saw_obtained(request_id, asked, proposed)
        bad = int(accepted < proposed)
        self._saw(request_id, "slim" if tiered else "at_full", accepted, bad)
        self._outcomes += accepted + bad
        request = self._requests.get(request_id)
        if tiered and request is not None and request.is_greedy and request.rule == LOSSLESS:
            judged = judged_drafts(*self._opened.pop(request_id, (0, 0)), proposed, accepted)
            self._saw(request_id, "at_full", *judged)

    def _saw_obtained(
        self, request_id: str, asked: int, drafted: int, kind: str = "obtained"
    ) -> None:
        if asked > 0:
            share = min(drafted / asked, 1.0)
            self._saw(request_id, kind, share, 1 - share)

    def _saw(self, request_id: str, kind: str, good: float, bad: float) -> None:
        if good + bad > 0:
            self.add(request_id, LOSSLESS)
            request = self._requests[request_id]
            getattr(request, kind).saw(good, bad)
            getattr(self._common[request.rule], kind).saw(good, bad)

    # Decisions.

    def plan(self, request_ids: Sequence[str], decoding: int = 0) -> Plan:
        """The plan of the next step, called once per step.

        Args:
            request_ids: those that decode in it; with none of them the last plan stays.
            decoding: how many decode, where some of them get no drafts and are not among those.
        """
        if not request_ids:
            return self._plan
        self._others = max(decoding - len(request_ids), 0)
        self._step += 1
        count = len(request_ids), self._others
        resized = sum(abs(a - b) for a, b in zip(count, self._planned_for, strict=True)) * 8 > sum(
            self._planned_for
        )
        over = self._trial_is_over() if self._on_trial else self._step >= self._next_choice
        if over or (resized and not self._on_trial) or not self._is_allowed(request_ids):
            self._choose(request_ids)
        self._trial_steps += self._on_trial
        self._bank = min(self._bank + self.budget * self._seconds, LARGEST_BANK * self._seconds)
        self._steps_of[_kind(self._plan)] += 1
        return self._plan

    def another_round(
        self, window_lengths: Sequence[int], rounds_done: int, request_ids: Sequence[str]
    ) -> bool:
        """Whether one more round is worth its time; asked after each round.

        It adds `s^w q` tokens to a window of w slim tokens (`q` under the paper's rule, where none
        of them can fail any more), and has to bring them at the rate that the plan promises. What
        it brings falls with w, so that looking one round ahead is enough.

        Args:
            window_lengths: of the requests that are still open: neither full nor escalated.
            rounds_done: in this window.
            request_ids: in the same order.
        """
        if not request_ids or rounds_done >= min(self._plan.rounds, self.max_rounds):
            return False
        if self._on_trial or self._times is None:
            return True
        missing = [request_id for request_id in request_ids if request_id not in self._gains]
        if missing:
            accept = self._acceptance(missing).later()
            per_round = one_round(accept, np.array([self._plan.drafts]))
            safe = np.where(accept.own > 0, accept.slim, 1.0)
            each = zip(safe, per_round.kept[:, 0], per_round.length[:, 0], strict=True)
            self._gains.update(zip(missing, each, strict=True))
        gained = added = 0.0
        rows = self._beside.rows[self._plan.drafts]
        for request_id, length in zip(request_ids, window_lengths, strict=True):
            chance, kept, mean = self._gains[request_id]
            room = min(self.max_window - length, mean)
            gained += kept * room / mean * chance**length
            added += room
            rows += 1 + length
        drafts, times = self._plan.drafts, self._times
        before, after = times.full((rows, rows + added))
        seconds = times.slim(len(request_ids) * (drafts + 1)) + after - before
        # The drafter is asked first; without an answer the window ends.
        cost = times.draft[drafts] + self._found * seconds
        return bool(self._found * gained > self._rate * cost)

    def outlook(self, request_ids: Sequence[str]) -> Outlook | None:
        """`[D + 1, R + 1]`, what each number of drafts and rounds promises by what was seen; None
        before the first full pass."""
        return self._table(request_ids, self._allowed(request_ids))

    def snapshot(self) -> dict[str, Any]:
        """For logs: seconds by size of a pass at the usual pace, the pace at present, chances per
        token by rule, the plan."""
        return {
            "pace": self._pace.now,
            "seconds": {
                "full": dict(self._full.points()),
                "slim": dict(self._slim.points()),
                "draft": self._draft_seconds(self._planned_for[0]).tolist(),
                "overhead": self._overhead_seconds(sum(self._planned_for)),
            },
            "acceptance": {
                rule: {kind: self._share(rule, kind) for kind in KINDS} for rule in self._common
            },
            "plan": {"drafts": self._plan.drafts, "rounds": self._plan.rounds},
            "on_trial": self._on_trial,
            "tokens_per_second": self._rate,
            "steps": dict(zip(("none", "plain", "tiered"), self._steps_of, strict=True)),
            "trial_seconds_left": self._bank,
        }

    # Estimates.

    def _share(self, rule: str, kind: str) -> float:
        shares, prior, trials = self._common[rule], PRIOR[kind], PRIOR_TRIALS
        if kind in ALIKE[rule]:
            name, most = ALIKE[rule][kind]
            other: Share = getattr(shares, name)
            prior = other.estimate(prior, trials)
            trials += min(other.all, most)
        return float(getattr(shares, kind).estimate(prior, trials))

    def _acceptance(self, request_ids: Sequence[str]) -> Acceptance:
        requests = [self._requests.get(request_id) or Shares() for request_id in request_ids]
        common = {
            rule: {kind: self._share(rule, kind) for kind in KINDS}
            for rule in {request.rule for request in requests}
        }
        shares = [_shares_of(request, common[request.rule]) for request in requests]
        own = [float(request.rule != PAPER) for request in requests]
        return Acceptance(**dict(zip(KINDS, np.array(shares).T, strict=True)), own=np.array(own))

    def _overhead_seconds(self, requests: int) -> float:
        curve = self._overhead.curve()
        return float(curve(requests)) if curve else 0.0

    def _draft_seconds(self, requests: int) -> np.ndarray:
        """`[D + 1]`, from the nearest batch size that was seen."""
        if not self._draft:
            return np.zeros(self.max_drafts + 1)
        size = requests.bit_length()
        nearest = min(self._draft, key=lambda seen: (abs(seen - size), seen))
        points = self._draft[nearest].points()
        if points[0][0] > 0:
            # A drafter that is called for no drafts takes about as long as for one.
            one = points[0][1] / points[0][0]
            points = [(0.0, one if self._drafts_for_nothing else 0.0), *points]
        return np.asarray(Curve(*zip(*points, strict=True))(np.arange(self.max_drafts + 1)))

    def _table(
        self, request_ids: Sequence[str], allowed: Sequence[int], hope: float = 0.0
    ) -> Outlook | None:
        """`[D + 1, R + 1]`, by drafts and rounds; None before the first full pass.

        Args:
            hope: standard errors by which the full model's and the slim verifier's acceptance are
                taken to be better than what was seen.
        """
        full, slim = self._full.curve(), self._slim.curve()
        if full is None:
            return None
        count = len(request_ids)
        overhead = self._overhead_seconds(count + self._others)
        times = Times(self._draft_seconds(count), slim or full, full, overhead)
        tiered_ids = [name for name in request_ids if self._has_tier(name)]
        plain_ids = [name for name in request_ids if not self._has_tier(name)]
        if not tiered_ids:
            tiered_ids, plain_ids = plain_ids, []
        accept = self._sampled(tiered_ids, hope)
        beside = Beside.of(
            self._sampled(plain_ids, hope) if plain_ids else None, self.max_drafts, self._others
        )
        self._times, self._found, self._beside = times, accept.later().found, beside
        plain = plain_outlook(accept, times, beside)
        shape = self.max_drafts + 1, self.max_rounds + 1
        # What is not possible brings nothing, in the time of what is.
        tokens, seconds = np.zeros(shape), np.full(shape, plain.seconds.max())
        tokens[:, 0], seconds[:, 0] = plain.tokens, plain.seconds
        if TIERED in allowed:
            tiered = tiered_outlook(accept, times, self.max_window, self.max_rounds, beside)
            tokens[1:, 1:], seconds[1:, 1:] = tiered.tokens, tiered.seconds
        return Outlook(tokens, seconds)

    def _sampled(self, request_ids: Sequence[str], hope: float) -> Acceptance:
        """Chances of some of these requests, who stand for all of them: by their rules, so that
        few under one rule do not stand for many under another."""
        ordered = sorted(request_ids, key=self._rule)
        sample = ordered[:: -(-len(request_ids) // self._sample_size())]
        accept = replace(self._acceptance(sample), weight=len(request_ids) / len(sample))
        for kind in sum(NEEDS.values(), ()) if hope else ():
            hoped = getattr(accept, kind) + hope * self._error(kind)
            accept = replace(accept, **{kind: np.minimum(hoped, 1.0)})
        return accept

    def _sample_size(self) -> int:
        return max(min(LARGEST_TABLE // self._cells(), LARGEST_SAMPLE), LEAST_SAMPLE)

    def _slowness(self, count: int) -> int:
        """How many times as long as usual a table of so many requests takes."""
        times = -(-min(count, self._sample_size()) * self._cells() // LARGEST_TABLE)
        return min(times, SLOWEST)

    def _cells(self) -> int:
        """Of the largest array of a table, per request."""
        lengths = self.max_window - 1 if self.max_rounds > 1 else 1
        return max(self.max_drafts * lengths**2, 1)

    def _error(self, kind: str) -> float:
        """The standard error of a chance, under the rule that it is best known of."""
        seen = {rule: getattr(shares, kind).all for rule, shares in self._common.items()}
        rule = max(seen, key=seen.__getitem__, default=LOSSLESS)
        chance, trials = self._share(rule, kind), seen.get(rule, 0.0) + PRIOR_TRIALS
        return float(np.sqrt(chance * (1 - chance) / trials))

    # The choice.

    def _is_allowed(self, request_ids: Sequence[str]) -> bool:
        return self._plan.rounds == 0 or TIERED in self._allowed(request_ids)

    def _allowed(self, request_ids: Sequence[str]) -> list[int]:
        """Kinds of plan that are possible for some requests."""
        if self.max_drafts == 0:
            return [NONE]
        decoding = len(request_ids) + self._others
        too_many = self.max_batch is not None and decoding > self.max_batch
        if self.max_rounds == 0 or too_many:
            return [NONE, PLAIN]
        if not any(map(self._has_tier, request_ids)):
            return [NONE, PLAIN]
        return [NONE, PLAIN, TIERED]

    def _has_tier(self, request_id: str) -> bool:
        return self._rule(request_id) != OFF

    def _rule(self, request_id: str) -> str:
        request = self._requests.get(request_id)
        return LOSSLESS if request is None else request.rule

    def _choose(self, request_ids: Sequence[str]) -> None:
        """Sets the plan, for `refresh` steps or for a trial."""
        self._planned_for = len(request_ids), self._others
        self._next_choice = self._step + self.refresh * self._slowness(len(request_ids))
        self._gains.clear()
        allowed = self._allowed(request_ids)
        table = self._table(request_ids, allowed)
        self._end_trial(table)
        untried = [kind for kind in allowed if kind not in self._last_trial]
        if untried:
            return self._start_trial(self._fitting(FIRST_PLANS[untried[0]]), FIRST_TRIAL)
        if table is None:
            return None
        rates = table.rates
        best = {kind: _best_plan(rates, kind) for kind in allowed}
        self._use(rates, best)
        cell = self._used.drafts, self._used.rounds
        self._rate, self._seconds = float(rates[cell]), float(table.seconds[cell])
        self._plan = self._used
        due = self._due(table, best, request_ids)
        if due is not None:
            for shares in (*self._common.values(), *self._requests.values()):
                for need in NEEDS[due]:
                    getattr(shares, need).fade(TRIAL_FADE)
            self._start_trial(best[due], TRIAL)
        return None

    def _use(self, rates: np.ndarray, best: dict[int, Plan]) -> None:
        """The best plan of the kind in use, or of one that is better by the margin and known."""
        if _kind(self._used) not in best:
            self._used = Plan(self._used.drafts, 0)
        own = best[_kind(self._used)]
        if rates[own.drafts, own.rounds] > rates[self._used.drafts, self._used.rounds] * 1.003:
            self._used = own
        least = rates[self._used.drafts, self._used.rounds] * (1 + self.margin)
        for kind, plan in best.items():
            rate = rates[plan.drafts, plan.rounds]
            if rate > least and self._is_known(kind):
                self._used, least = plan, rate
        self._last_trial[_kind(self._used)] = self._step

    def _is_known(self, kind: int) -> bool:
        """Whether enough was seen of what a kind of plan depends on, under any rule there is."""
        return all(
            max(getattr(shares, need).all for shares in self._common.values()) >= ENOUGH_EVIDENCE
            for need in NEEDS[kind]
        )

    def _due(self, table: Outlook, best: dict[int, Plan], request_ids: Sequence[str]) -> int | None:
        """The kind that was longest not tried, if it is time and the budget covers it."""
        due = [
            kind
            for kind in best
            if kind != _kind(self._used)
            and self._step - self._last_trial[kind]
            >= self.interval * (SELDOM if kind == NONE else 1)
        ]
        bank = dict.fromkeys(due, self._bank)
        if due:
            # What may well be the best is tried on credit: at the start nothing is known for sure.
            hoped = self._table(request_ids, list(best), HOPE)
            assert hoped is not None
            for kind in due:
                plan = _best_plan(hoped.rates, kind)
                if hoped.rates[plan.drafts, plan.rounds] > self._rate:
                    bank[kind] += LARGEST_BANK * self._seconds
        due = [kind for kind in due if self._lost(table, best[kind], SHORT_TRIAL) <= bank[kind]]
        return min(due, key=self._last_trial.__getitem__, default=None)

    def _lost(self, table: Outlook, plan: Plan, steps: int) -> float:
        """Seconds that steps of a plan lose against the best plan."""
        cell = plan.drafts, plan.rounds
        share = 1 - float(table.rates[cell] / table.rates.max())
        return steps * float(table.seconds[cell]) * share

    def _fitting(self, plan: Plan) -> Plan:
        return Plan(min(plan.drafts, self.max_drafts), min(plan.rounds, self.max_rounds))

    def _start_trial(self, plan: Plan, size: tuple[int, int]) -> None:
        self._plan, self._trial_size = plan, size
        self._trial_steps = self._outcomes = 0
        self._on_trial = True
        self._last_trial[_kind(plan)] = self._step

    def _trial_is_over(self) -> bool:
        steps, outcomes = self._trial_size
        enough = self._plan.drafts == 0 or self._outcomes >= outcomes
        return self._trial_steps >= (SHORT_TRIAL if enough else steps)

    def _end_trial(self, table: Outlook | None) -> None:
        """What a trial has lost is known best at its end, from what it taught. First trials are
        owed to nobody."""
        if self._on_trial and table is not None and self._trial_size != FIRST_TRIAL:
            self._bank -= self._lost(table, self._plan, self._trial_steps)
        self._on_trial = False


class FixedRounds:
    """Stands in for the controller under `--via-sd-rounds N`: always the same plan, and no slim
    tier while more than `max_batch` requests decode."""

    def __init__(self, drafts: int, rounds: int, max_batch: int | None = None) -> None:
        self.fixed, self.max_batch = Plan(drafts, rounds), max_batch

    def plan(self, request_ids: Sequence[str], decoding: int = 0) -> Plan:
        count = max(decoding, len(request_ids))
        if self.max_batch is not None and count > self.max_batch:
            return Plan(self.fixed.drafts, 0)
        return self.fixed

    def another_round(self, lengths: Sequence[int], done: int, request_ids: Sequence[str]) -> bool:
        return done < self.fixed.rounds

    def __getattr__(self, name: str) -> Any:
        if name.startswith("saw_") or name in ("add", "remove"):
            return lambda *args, **kwargs: None
        raise AttributeError(name)


def _shares_of(request: Shares, common: dict[str, float]) -> list[float]:
    """In the order of `KINDS`; `common` is what all requests with its rule have."""
    found = []
    for kind, prior in common.items():
        if kind in TOGETHER:
            usual = common[TOGETHER[kind]]
            other: Share = getattr(request, TOGETHER[kind])
            differs = _log_odds(other.estimate(usual, COMMON_TRIALS)) - _log_odds(usual)
            # odds' = odds exp(BELIEVED differs)
            prior = prior / (prior + (1 - prior) * exp(-BELIEVED * differs))
        found.append(getattr(request, kind).estimate(prior, COMMON_TRIALS))
    return found


def _log_odds(chance: float) -> float:
    """Of a chance that is not too near to 0 or 1, where small differences would seem large."""
    chance = min(max(chance, 0.01), 0.99)
    return log(chance / (1 - chance))


def _kind(plan: Plan) -> int:
    return NONE if plan.drafts == 0 else TIERED if plan.rounds else PLAIN


def _best_plan(rates: np.ndarray, kind: int) -> Plan:
    if kind == NONE:
        return Plan(0, 0)
    if kind == PLAIN:
        return Plan(1 + int(rates[1:, 0].argmax()), 0)
    drafts, rounds = np.unravel_index(int(rates[1:, 1:].argmax()), rates[1:, 1:].shape)
    return Plan(1 + int(drafts), 1 + int(rounds))
