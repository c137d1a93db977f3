# SPDX-License-Identifier: Apache-2.0
"""How many drafts and how many rounds of slim checks the next window gets, or none of either, from
measured pass times and acceptances (the tiers are those of arXiv:2606.12243, the choice is ours).
It promises that the slim tier costs little where it does not pay: everything is tried now and then,
and what the trials lose stays within a budget.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from statistics import median_low
from typing import Any

import numpy as np

# Beyond this an acceptance is as good as 1, and 1 / (1 - s) is still exact to 7 digits.
LARGEST_ACCEPTANCE = 1 - 1e-8

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
    """Chances per token, `[B]` float64 each, of the B requests of a batch.

    Attributes:
        at_full: the full model accepts a draft.
        at_slim: the slim verifier accepts a draft.
        slim: the full model accepts a token of the slim tier; under the paper's rule, the share of
            such tokens that do not escalate.
        obtained: drafts obtained, as a share of those asked for: n-grams often find none.
        weight: how many requests each of the B stands for.
    """

    at_full: np.ndarray
    at_slim: np.ndarray
    slim: np.ndarray
    obtained: np.ndarray
    weight: float = 1.0


class Curve:
    """Seconds of a pass as a non-decreasing function of its size, linear between known points.

    Below the first point it is flat, beyond the last it goes on with the mean slope of all points:
    flat where only one is known, so that what was never tried looks cheap enough to be tried.
    """

    def __init__(self, sizes: Sequence[float], seconds: Sequence[float]) -> None:
        far = 2.0 * sizes[-1] + 1024.0
        slope = (seconds[-1] - seconds[0]) / max(sizes[-1] - sizes[0], 1e-9)
        self._sizes = [*sizes, far]
        self._seconds = [*seconds, seconds[-1] + slope * (far - sizes[-1])]
        self._arrays = np.array(self._sizes), np.array(self._seconds)
        self.points = dict(zip(sizes, seconds, strict=True))

    def __call__(self, sizes: np.ndarray) -> np.ndarray:
        """Seconds, in the shape of `sizes`."""
        return np.interp(sizes, *self._arrays)

    def at(self, size: float) -> float:
        """Seconds at one size; plain Python, because it is asked between two passes."""
        after = bisect_right(self._sizes, size)
        if after == 0:
            return self._seconds[0]
        if after == len(self._sizes):
            return self._seconds[-1]
        left, right = self._sizes[after - 1], self._sizes[after]
        share = (size - left) / (right - left)
        return self._seconds[after - 1] * (1 - share) + self._seconds[after] * share


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


def draft_tokens(accept: np.ndarray, drafts: np.ndarray, obtained: np.ndarray) -> np.ndarray:
    """Tokens that one check of `d` drafts brings, the checker's own among them, on the mean.

        1 + h (a + a^2 + ... + a^d) = 1 + h ((1 - a^(d+1)) / (1 - a) - 1)

    Args:
        accept: `a`, per token.
        drafts: `d`.
        obtained: `h`, the chance that the drafter finds its drafts.
    """
    a = np.minimum(accept, LARGEST_ACCEPTANCE)
    return 1 + obtained * ((1 - a ** (drafts + 1)) / (1 - a) - 1)


def round_survival(
    at_slim: np.ndarray, slim: np.ndarray, drafts: np.ndarray, obtained: np.ndarray
) -> np.ndarray:
    """`g`, the chance that the full model accepts every token of one round.

    A round is `L` tokens long, `P(L = k + 1) = (1 - a) a^k` for k < d and `P(L = d + 1) = a^d`:

        E[s^L] = s ((1 - a) (1 - (a s)^d) / (1 - a s) + (a s)^d)

    Args:
        at_slim: `a`, acceptance of drafts at the slim verifier.
        slim: `s`, acceptance of slim tokens at the full model.
        drafts: `d`.
        obtained: the chance that the drafter finds its drafts; without, `L = 1`.
    """
    a, s = at_slim, np.minimum(slim, LARGEST_ACCEPTANCE)
    both = (a * s) ** drafts
    found = (1 - a) * (1 - both) / (1 - a * s) + both
    return s * (1 - obtained + obtained * found)


def window_tokens(survival: np.ndarray, slim: np.ndarray, rounds: np.ndarray) -> np.ndarray:
    """Tokens that one full pass over `R` rounds brings, its own among them, on the mean.

    `(1 - s^(N+1)) / (1 - s)` for a window of N tokens; N is a sum of R independent rounds, and
    `E[s^N] = g^R`, so the mean is exact:

        (1 - s g^R) / (1 - s)
    """
    s = np.minimum(slim, LARGEST_ACCEPTANCE)
    # At s -> 1 both differences vanish; g carries the same bound, so their ratio stays right.
    return (1 - s * survival**rounds) / (1 - s)


def plain_outlook(accept: Acceptance, times: Times) -> Outlook:
    """`[D + 1]`: plain speculative decoding with 0..D drafts.

    sum_i draft_tokens_i(d) in draft(d) + full(sum_i (1 + d h_i)) + overhead
    """
    drafts = np.arange(len(times.draft))
    tokens = draft_tokens(accept.at_full[:, None], drafts, accept.obtained[:, None]).sum(0)
    rows = len(accept.at_full) + drafts * accept.obtained.sum()
    seconds = times.draft + times.full(accept.weight * rows) + times.overhead
    return Outlook(accept.weight * tokens, seconds)


def tiered_outlook(
    accept: Acceptance, times: Times, max_window: int, paper: bool = False
) -> Outlook:
    """`[D, W]`: windows of 1..W rounds with 1..D drafts each.

    With g and n the survival and the mean length of a round, window `N_i = min(R n_i, W)`:

        lossless   sum_i window_tokens_i in R (draft(d) + slim(rows)) + full(sum_i (1 + N_i))
        paper      the same, but a request is done with its first token that escalates: round r has
                   g_i^(r-1) of it left, and there is no such round when nobody is left

    Rounds that a full window leaves no room for bring no tokens.

    Args:
        max_window: `W`, the most tokens between two full passes.
    """
    s, h = accept.slim[:, None], accept.obtained[:, None]
    drafts, rounds = np.arange(1, len(times.draft)), np.arange(1, max_window + 1)
    length = draft_tokens(accept.at_slim[:, None], drafts, h)  # [B, D]
    survival = round_survival(accept.at_slim[:, None], s, drafts, h)[..., None]  # [B, D, 1]
    window = np.minimum(length[..., None] * rounds, max_window)  # [B, D, W]
    tokens = window_tokens(survival, s[..., None], rounds)
    tokens = np.minimum(tokens, window_tokens(s, s, np.array(max_window))[..., None])
    rows = accept.weight * (len(s) + drafts * h.sum())  # [D]
    if paper:
        left = survival ** (rounds - 1)  # [B, D, W]
        somebody = np.maximum(1 - np.prod(1 - left, axis=0) ** accept.weight, 1e-12)  # [D, W]
        slim_rows = rows[:, None] * left.mean(0) / somebody
        seconds = np.cumsum(somebody * (times.draft[1:, None] + times.slim(slim_rows)), axis=1)
        window = np.minimum(window, tokens)
    else:
        seconds = (times.draft[1:] + times.slim(rows))[:, None] * rounds
    full_rows = accept.weight * (len(s) + window.sum(0))
    needed = np.ceil(max_window / length.mean(0))[:, None]
    return Outlook(
        np.where(rounds <= needed, accept.weight * tokens.sum(0), 0.0),
        seconds + times.full(full_rows) + times.overhead,
    )


# --- What was seen --------------------------------------------------------------------------------


class PassTimes:
    """Seconds of one kind of pass by size: medians, so that a few slow passes change nothing.

    Args:
        keep: samples of one size.
        group: a median is taken of at least so many; sizes seen less often share one.
        memory: a size not seen for so many steps is forgotten while others are seen.
    """

    def __init__(self, keep: int = 15, group: int = 5, memory: int = 2000) -> None:
        self.keep, self.group, self.memory = keep, group, memory
        self._samples: dict[int, deque[float]] = {}
        self._seen: dict[int, int] = {}
        self._curve: Curve | None = None

    def __len__(self) -> int:
        return sum(map(len, self._samples.values()))

    def saw(self, size: int, seconds: float, step: int) -> None:
        """A pass of `size` rows took `seconds`, in step number `step`."""
        # Four leading bits: sizes within an eighth share a median.
        shift = max(size.bit_length() - 4, 0)
        bucket = (size >> shift) << shift
        if bucket not in self._samples:
            self._samples[bucket] = deque(maxlen=self.keep)
        self._samples[bucket].append(seconds)
        self._seen[bucket] = step
        self._curve = None

    def curve(self) -> Curve | None:
        """What is known by now; None before the first pass."""
        if self._curve is None and self._samples:
            self._forget()
            sizes, seconds = zip(*_never_falling(self._groups()), strict=True)
            self._curve = Curve(sizes, seconds)
        return self._curve

    def _forget(self) -> None:
        newest = max(self._seen.values())
        for bucket, step in list(self._seen.items()):
            if newest - step > self.memory:
                del self._seen[bucket], self._samples[bucket]

    def _groups(self) -> list[tuple[float, list[float]]]:
        """Mean size and samples; neighbours join until there are enough for a median."""
        groups: list[tuple[float, list[float]]] = []
        for bucket in sorted(self._samples):
            group = (float(bucket), list(self._samples[bucket]))
            if groups and len(groups[-1][1]) < self.group:
                group = _joined(groups.pop(), group)
            groups.append(group)
        if len(groups) > 1 and len(groups[-1][1]) < self.group:
            last = groups.pop()
            groups.append(_joined(groups.pop(), last))
        return groups


def _joined(
    left: tuple[float, list[float]], right: tuple[float, list[float]]
) -> tuple[float, list[float]]:
    """Two groups as one, at the mean size of their samples."""
    samples = left[1] + right[1]
    size = left[0] * len(left[1]) + right[0] * len(right[1])
    return size / len(samples), samples


def _never_falling(groups: list[tuple[float, list[float]]]) -> list[tuple[float, float]]:
    """Size and median, with neighbours joined where a larger pass seems faster than a smaller."""
    kept: list[tuple[float, list[float]]] = []
    for group in groups:
        kept.append(group)
        while len(kept) > 1 and median_low(kept[-1][1]) < median_low(kept[-2][1]):
            last = kept.pop()
            kept.append(_joined(kept.pop(), last))
    return [(size, median_low(samples)) for size, samples in kept]


class DraftTimes:
    """Seconds of one call of the drafter, by requests and by drafts per request."""

    def __init__(self) -> None:
        self._by_requests: dict[int, PassTimes] = {}

    def __len__(self) -> int:
        return sum(map(len, self._by_requests.values()))

    def saw(self, requests: int, drafts: int, seconds: float, step: int) -> None:
        """One call for `drafts` tokens of each of `requests`."""
        self._by_requests.setdefault(requests.bit_length(), PassTimes()).saw(drafts, seconds, step)

    def seconds(self, requests: int, most: int) -> np.ndarray:
        """`[most + 1]` float64, from the nearest batch size that was seen.

        Proportional to the drafts until two numbers of drafts were seen.
        """
        if not self._by_requests:
            return np.zeros(most + 1)
        size = requests.bit_length()
        nearest = min(self._by_requests, key=lambda seen: (abs(seen - size), seen))
        curve = self._by_requests[nearest].curve()
        assert curve is not None
        drafts = np.arange(most + 1)
        share = drafts / min(curve.points)
        return curve(drafts) * (share if len(curve.points) == 1 else np.minimum(share, 1))


@dataclass(slots=True)
class Share:
    """A chance per token, from counts that fade.

    Attributes:
        good, all: successes and trials, faded.
        step: the last step with a trial.
    """

    good: float = 0.0
    all: float = 0.0
    step: int = 0

    def saw(self, good: float, bad: float, step: int, horizon: float) -> None:
        """Trials with known outcome. A check that stops at its first failure has at most one bad
        one; drafts behind it were not tried, and what was not tried does not count."""
        fade = max(1 - (good + bad) / horizon, 0.0)
        self.good = self.good * fade + good
        self.all = self.all * fade + good + bad
        self.step = step

    def aged(self, step: int, half_life: float, least: float) -> tuple[float, float]:
        """Successes and trials as they count now: evidence halves with time, down to `least`."""
        if self.all <= least:
            return self.good, self.all
        factor = max(0.5 ** ((step - self.step) / half_life), least / self.all)
        return self.good * factor, self.all * factor


@dataclass(slots=True)
class Shares:
    """The counts behind an `Acceptance`, of one request or of all."""

    at_full: Share = field(default_factory=Share)
    at_slim: Share = field(default_factory=Share)
    slim: Share = field(default_factory=Share)
    obtained: Share = field(default_factory=Share)


KINDS = tuple(each.name for each in fields(Shares))

# --- What is done ---------------------------------------------------------------------------------

# What is believed before the first trial, and how many trials that belief is worth.
PRIOR = {"at_full": 0.6, "at_slim": 0.6, "slim": 0.8, "obtained": 0.9}
PRIOR_TRIALS = 2.0
# How many trials the batch's share is worth for a request that has none of its own.
COMMON_TRIALS = 16.0
# Trials after which evidence has faded, of all requests and of one.
HORIZON, REQUEST_HORIZON = 400.0, 200.0
# What is not tried is no longer trusted: its evidence halves, down to a few trials.
HALF_LIFE, LEAST_EVIDENCE = 400.0, 8.0
# Kinds of plan. A kind that is not in use must show so many trials before it is used.
NONE, PLAIN, TIERED = range(3)
ENOUGH_EVIDENCE = 16.0
# Steps of a trial, and the outcomes that end it early.
SHORT_TRIAL, LONG_TRIAL, TRIAL_OUTCOMES = 3, 8, 24
# Plain decoding has no acceptance to learn: its trials may be so many times rarer.
SELDOM = 10
# With fewer drafts a trial teaches little.
TRIAL_DRAFTS = 2
FIRST_PLANS = (Plan(0, 0), Plan(4, 0), Plan(2, 2))
# Requests that a plan is made for; in larger batches some stand for all.
LARGEST_SAMPLE = 32


class RoundController:
    """Chooses drafts and rounds for the next step from what was seen of the last ones.

    The same calls always give the same plans: there is no clock and no chance in it.

    Args:
        max_drafts: most tokens that the drafter may propose at a time.
        max_window: most tokens between two passes of the full model.
        paper: the paper's lossy rule: tokens that do not escalate are kept.
        max_batch: no slim tier while more requests than this decode.
        budget: share of the time that trials of what seems worse may lose.
        refresh: steps for which a plan is kept.
        margin: a plan must promise so much more than the present one to replace it.
        interval: steps between trials of the same kind of plan.
    """

    def __init__(
        self,
        max_drafts: int,
        max_window: int,
        *,
        paper: bool = False,
        max_batch: int | None = None,
        budget: float = 0.02,
        refresh: int = 8,
        margin: float = 0.01,
        interval: int = 100,
    ) -> None:
        self.max_drafts, self.max_window = max_drafts, max_window
        self.paper, self.max_batch = paper, max_batch
        self.budget, self.refresh, self.margin = budget, refresh, margin
        self.interval = interval
        self._full, self._slim, self._overhead = PassTimes(), PassTimes(), PassTimes()
        self._draft = DraftTimes()
        self._common = Shares()
        self._requests: dict[str, Shares] = {}
        self._step = 0
        # The plan of this step, and the plan between trials.
        self._plan = self._used = Plan(0, 0)
        # Tokens per second and seconds per step that the latter promises; 0 while nothing is known.
        self._rate = self._seconds = 0.0
        self._times: Times | None = None
        self._planned_for = 0
        self._next_choice = 0
        self._on_trial = False
        self._trial_steps = self._outcomes = 0
        self._last_trial: dict[int, int] = {}
        self._bank = 0.0
        self._steps_of = [0, 0, 0]
        self._gains: dict[str, tuple[float, float, float]] = {}

    # Observations.

    def saw_full(self, requests: int, rows: int, seconds: float) -> None:
        """One pass of the full model without prompt rows.

        Args:
            requests: in the pass.
            rows: of all of them: newest tokens and windows or drafts.
            seconds: wall clock.
        """
        self._full.saw(rows, seconds, self._step)

    def saw_slim(self, requests: int, rows: int, seconds: float) -> None:
        """One pass of the slim verifier and its check; arguments as of `saw_full`."""
        self._slim.saw(rows, seconds, self._step)

    def saw_draft(self, requests: int, drafts: int, seconds: float) -> None:
        """One call of the drafter.

        Args:
            requests: in the call.
            drafts: asked for, of each.
            seconds: wall clock.
        """
        if drafts > 0:
            self._draft.saw(requests, drafts, seconds, self._step)

    def saw_overhead(self, requests: int, seconds: float) -> None:
        """What a step took beside its passes: scheduling, sampling, output."""
        self._overhead.saw(requests, seconds, self._step)

    def saw_slim_check(
        self, request_id: str, drafted: int, accepted: int, asked: int | None = None
    ) -> None:
        """The slim verifier's check of one round.

        Args:
            drafted: drafts that there were.
            accepted: leading ones that it accepted; under the paper's rule, those of tier A.
            asked: drafts that the drafter was asked for; None where only whether it found any is
                known.
        """
        self._saw_obtained(request_id, drafted, asked)
        self._saw(request_id, "at_slim", accepted, int(accepted < drafted))

    def saw_full_check(
        self,
        request_id: str,
        proposed: int,
        accepted: int,
        tiered: bool,
        escalated: int = 0,
        asked: int | None = None,
    ) -> None:
        """The full model's check of a window, or of plain drafts.

        Args:
            proposed: tokens of the window, or drafts.
            accepted: leading ones that it accepted.
            tiered: whether the slim verifier had checked them.
            escalated: under the paper's rule, those that the slim verifier left to it.
            asked: of plain drafts, as in `saw_slim_check`.
        """
        if tiered:
            bad = escalated if self.paper else int(accepted < proposed)
            good = proposed - escalated if self.paper else accepted
            self._saw(request_id, "slim", good, bad)
        else:
            self._saw_obtained(request_id, proposed, asked)
            good, bad = accepted, int(accepted < proposed)
            self._saw(request_id, "at_full", good, bad)
        self._outcomes += good + bad

    def _saw_obtained(self, request_id: str, drafted: int, asked: int | None) -> None:
        if asked == 0:
            return
        share = min(drafted / asked, 1.0) if asked else float(drafted > 0)
        self._saw(request_id, "obtained", share, 1 - share)

    def _saw(self, request_id: str, kind: str, good: float, bad: float) -> None:
        if good + bad == 0:
            return
        if request_id not in self._requests:
            self._requests[request_id] = Shares()
        getattr(self._common, kind).saw(good, bad, self._step, HORIZON)
        getattr(self._requests[request_id], kind).saw(good, bad, self._step, REQUEST_HORIZON)

    def remove(self, request_id: str) -> None:
        """The request has ended; what it taught about all requests stays."""
        self._requests.pop(request_id, None)
        self._gains.pop(request_id, None)

    # Decisions.

    def plan(self, request_ids: Sequence[str]) -> Plan:
        """The plan of the next step, called once per step.

        Args:
            request_ids: those that decode in it.
        """
        self._step += 1
        resized = abs(len(request_ids) - self._planned_for) * 8 > self._planned_for
        over = self._trial_is_over() if self._on_trial else self._step >= self._next_choice
        if over or resized:
            self._choose(request_ids)
        if self._on_trial:
            self._trial_steps += 1
        self._bank += self.budget * self._seconds
        self._steps_of[_kind(self._plan)] += 1
        return self._plan

    def another_round(
        self, window_lengths: Sequence[int], rounds_done: int, request_ids: Sequence[str]
    ) -> bool:
        """Whether one more round is worth its time; asked after each round.

        A round adds `s^(w+1) (1 - g) / (1 - s)` tokens to a window of w slim tokens (`s (1 - g) /
        (1 - s)` under the paper's rule, where none of them can fail any more), and it has to bring
        them at the rate that the plan promises. What it brings falls with w, so that looking one
        round ahead is enough.

        Args:
            window_lengths: of the requests that are still open: neither full nor escalated.
            rounds_done: in this window.
            request_ids: in the same order.
        """
        if not request_ids or rounds_done >= self._plan.rounds:
            return False
        if self._on_trial or self._times is None:
            return True
        gained = added = rows = 0.0
        for request_id, length in zip(request_ids, window_lengths, strict=True):
            slim, gain, mean_length = self._gain(request_id)
            room = min(self.max_window - length, mean_length)
            gained += gain * room / mean_length * (1 if self.paper else slim**length)
            added += room
            rows += 1 + length
        drafts, full = self._plan.drafts, self._times.full
        seconds = self._times.draft[drafts] + self._times.slim.at(len(request_ids) * (drafts + 1))
        return gained > self._rate * (seconds + full.at(rows + added) - full.at(rows))

    def _gain(self, request_id: str) -> tuple[float, float, float]:
        """`s`, `s (1 - g) / (1 - s)` and the mean length of a round, of one request."""
        if request_id not in self._gains:
            accept = self._acceptance([request_id])
            drafts = np.array([self._plan.drafts])
            survival = round_survival(accept.at_slim, accept.slim, drafts, accept.obtained)
            tokens = window_tokens(survival, accept.slim, np.array([1])) - 1
            length = draft_tokens(accept.at_slim, drafts, accept.obtained)
            self._gains[request_id] = float(accept.slim[0]), float(tokens[0]), float(length[0])
        return self._gains[request_id]

    def snapshot(self) -> dict[str, Any]:
        """For logs and metrics: seconds by size of a pass, chances per token, the plan."""
        curves = {"full": self._full.curve(), "slim": self._slim.curve()}
        return {
            "seconds": {
                **{name: curve.points if curve else {} for name, curve in curves.items()},
                "draft": self._draft.seconds(self._planned_for, self.max_drafts).tolist(),
                "overhead": self._overhead_seconds(self._planned_for),
            },
            "acceptance": {kind: self._share(kind) for kind in KINDS},
            "evidence": {kind: self._evidence(kind) for kind in KINDS},
            "plan": {"drafts": self._plan.drafts, "rounds": self._plan.rounds},
            "on_trial": self._on_trial,
            "tokens_per_second": self._rate,
            "steps": dict(zip(("none", "plain", "tiered"), self._steps_of, strict=True)),
            "trial_seconds_left": self._bank,
        }

    # Estimates.

    def _share(self, kind: str) -> float:
        good, all_ = getattr(self._common, kind).aged(self._step, HALF_LIFE, LEAST_EVIDENCE)
        return (good + PRIOR_TRIALS * PRIOR[kind]) / (all_ + PRIOR_TRIALS)

    def _evidence(self, kind: str) -> float:
        return getattr(self._common, kind).aged(self._step, HALF_LIFE, LEAST_EVIDENCE)[1]

    def _acceptance(self, request_ids: Sequence[str]) -> Acceptance:
        every = -(-len(request_ids) // LARGEST_SAMPLE)
        sample = [self._requests.get(request_id) for request_id in request_ids[::every]]
        shares = {}
        for kind in KINDS:
            common = self._share(kind)
            found = np.full(len(sample), common)
            for i, request in enumerate(sample):
                if request is not None:
                    good, all_ = getattr(request, kind).aged(self._step, HALF_LIFE, 0.0)
                    found[i] = (good + COMMON_TRIALS * common) / (all_ + COMMON_TRIALS)
            shares[kind] = found
        return Acceptance(**shares, weight=len(request_ids) / len(sample))

    def _overhead_seconds(self, requests: int) -> float:
        curve = self._overhead.curve()
        return curve.at(requests) if curve else 0.0

    def _table(self, request_ids: Sequence[str]) -> Outlook | None:
        """`[D + 1, W + 1]`, by drafts and rounds; None before the first full pass."""
        full, slim = self._full.curve(), self._slim.curve()
        if full is None or not request_ids:
            return None
        count = len(request_ids)
        draft = self._draft.seconds(count, self.max_drafts)
        times = Times(draft, slim or full, full, self._overhead_seconds(count))
        accept = self._acceptance(request_ids)
        plain = plain_outlook(accept, times)
        shape = self.max_drafts + 1, self.max_window + 1
        # What is not possible brings nothing, in the time of what is.
        tokens, seconds = np.zeros(shape), np.full(shape, plain.seconds.max())
        tokens[:, 0], seconds[:, 0] = plain.tokens, plain.seconds
        if slim and TIERED in self._allowed(count):
            tiered = tiered_outlook(accept, times, self.max_window, self.paper)
            tokens[1:, 1:], seconds[1:, 1:] = tiered.tokens, tiered.seconds
        self._times = times
        return Outlook(tokens, seconds)

    # The choice.

    def _allowed(self, count: int) -> list[int]:
        """Kinds of plan that are possible for so many requests."""
        if self.max_drafts == 0:
            return [NONE]
        if self.max_window == 0 or (self.max_batch is not None and count > self.max_batch):
            return [NONE, PLAIN]
        return [NONE, PLAIN, TIERED]

    def _choose(self, request_ids: Sequence[str]) -> None:
        """Sets the plan, for `refresh` steps or for a trial."""
        count = self._planned_for = len(request_ids)
        self._next_choice = self._step + self.refresh
        self._gains.clear()
        table = self._table(request_ids)
        self._end_trial(table)
        allowed = self._allowed(count)
        untried = [kind for kind in allowed if kind not in self._last_trial]
        if untried:
            return self._start_trial(self._fitting(FIRST_PLANS[untried[0]]))
        if table is None:
            return None
        rates = table.rates
        best = {kind: _best_plan(rates, kind) for kind in allowed}
        self._use(rates, best)
        self._rate = float(rates[_cell(self._used)])
        self._seconds = float(table.seconds[_cell(self._used)])
        self._plan = self._used
        due = self._due(table, best)
        if due is not None:
            self._start_trial(best[due])
        return None

    def _use(self, rates: np.ndarray, best: dict[int, Plan]) -> None:
        """Replaces the plan in use where another is better by the margin, and known well enough."""
        if _kind(self._used) not in best:
            self._used = Plan(self._used.drafts, 0)
        least = rates[_cell(self._used)] * (1 + self.margin)
        better = [
            plan
            for kind, plan in best.items()
            if rates[_cell(plan)] > least and (kind == _kind(self._used) or self._trusted(kind))
        ]
        self._used = max(better, key=lambda plan: rates[_cell(plan)], default=self._used)
        self._last_trial[_kind(self._used)] = self._step

    def _trusted(self, kind: int) -> bool:
        """Whether enough was seen lately of what a kind of plan depends on."""
        needed = {NONE: (), PLAIN: ("at_full",), TIERED: ("at_slim", "slim")}[kind]
        return all(self._evidence(name) >= ENOUGH_EVIDENCE for name in needed)

    def _due(self, table: Outlook, best: dict[int, Plan]) -> int | None:
        """The kind that was longest not tried, if it is time and the budget covers it."""
        rates = table.rates
        due = []
        for kind, plan in best.items():
            if kind == _kind(self._used):
                continue
            promising = rates[_cell(plan)] > self._rate and not self._trusted(kind)
            wait = self.refresh if promising else self.interval * (SELDOM if kind == NONE else 1)
            lost = self._lost(table, self._trial_plan(plan), SHORT_TRIAL)
            if self._step - self._last_trial[kind] >= wait and self._bank >= lost:
                due.append(kind)
        return min(due, key=lambda kind: self._last_trial[kind], default=None)

    def _lost(self, table: Outlook, plan: Plan, steps: int) -> float:
        """Seconds that steps of a plan lose against the best plan."""
        share = 1 - float(table.rates[_cell(plan)] / table.rates.max())
        return steps * float(table.seconds[_cell(plan)]) * share

    def _trial_plan(self, plan: Plan) -> Plan:
        """A plan from which its kind can be judged."""
        if plan.drafts == 0:
            return plan
        return Plan(min(max(plan.drafts, TRIAL_DRAFTS), self.max_drafts), plan.rounds)

    def _fitting(self, plan: Plan) -> Plan:
        return Plan(min(plan.drafts, self.max_drafts), min(plan.rounds, self.max_window))

    def _start_trial(self, plan: Plan) -> None:
        self._plan = self._trial_plan(plan)
        self._trial_steps = self._outcomes = 0
        self._on_trial = True
        self._last_trial[_kind(plan)] = self._step

    def _trial_is_over(self) -> bool:
        enough = self._plan.drafts == 0 or self._outcomes >= TRIAL_OUTCOMES
        return self._trial_steps >= (SHORT_TRIAL if enough else LONG_TRIAL)

    def _end_trial(self, table: Outlook | None) -> None:
        """What a trial has lost is known best at its end, from what it taught."""
        if self._on_trial and table is not None:
            self._bank -= self._lost(table, self._plan, self._trial_steps)
        self._on_trial = False


def _kind(plan: Plan) -> int:
    return NONE if plan.drafts == 0 else TIERED if plan.rounds else PLAIN


def _cell(plan: Plan) -> tuple[int, int]:
    return plan.drafts, plan.rounds


def _best_plan(rates: np.ndarray, kind: int) -> Plan:
    if kind == NONE:
        return Plan(0, 0)
    if kind == PLAIN:
        return Plan(1 + int(rates[1:, 0].argmax()), 0)
    drafts, rounds = np.unravel_index(int(rates[1:, 1:].argmax()), rates[1:, 1:].shape)
    return Plan(1 + int(drafts), 1 + int(rounds))
