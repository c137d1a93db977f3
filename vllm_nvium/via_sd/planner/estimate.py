# SPDX-License-Identifier: Apache-2.0
"""What the planner knows: pass times, acceptance rates and hit rates, as the model runner reports
them. A request with few trials of its own is taken to be like the others with its rule.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import exp, log, prod

import numpy as np

from vllm_nvium.via_sd.planner.estimators import (
    PassTimeEstimator,
    RateEstimate,
    SurvivalByConfidence,
)
from vllm_nvium.via_sd.planner.model import (
    LOSSLESS,
    OFF,
    PAPER,
    AcceptanceRates,
    BackgroundLoad,
    PassTimeCurve,
    StepTimes,
)

# The rates that are estimated, as in `AcceptanceRates`, and what is believed of each before it was
# observed. That belief counts as much as `PRIOR_TRIALS` observed trials.
PRIOR = {
    "accept_full": 0.6,
    "accept_slim": 0.6,
    "accept_window": 0.8,
    "kept_rate": 0.9,
    "hit_rate": 0.9,
    "hit_rate_later": 0.9,
}
PRIOR_TRIALS = 2.0
# By rule and rate, the rate that is evidence for it, and the most trials that this evidence counts
# for. The slim verifier has most of the full model's layers, so that both judge drafts alike. Under
# the paper's rule they do not: there the slim verifier keeps nearly all drafts.
BY_HITS = {"hit_rate_later": ("hit_rate", 25.0)}
BY_OTHER_MODEL = {"accept_full": ("accept_slim", 100.0), "accept_slim": ("accept_full", 100.0)}
EVIDENCE = {LOSSLESS: BY_OTHER_MODEL | BY_HITS, PAPER: BY_HITS, OFF: BY_HITS}
# Trials of its own that a request needs until they count as much as the rate of all requests.
COMMON_TRIALS = 16.0
# If one model accepts a request's drafts more often than usual, the other one probably does, too.
# This share of the difference in log-odds is expected there.
PAIRED = {"accept_full": "accept_slim", "accept_slim": "accept_full"}
TRANSFER = 0.5


@dataclass(slots=True)
class RateEstimates:
    """All rates of one request, or of all requests with the same rule."""

    rule: str = LOSSLESS
    of: dict[str, RateEstimate] = field(
        default_factory=lambda: {name: RateEstimate() for name in PRIOR}
    )


def judge_drafts(
    num_drafted: int, num_slim_accepted: int, num_window_tokens: int, num_full_accepted: int
) -> tuple[int, int]:
    """What the full model would have said about the drafts that opened a window, had they gone to
    it directly. Lossless requests only, where at most one token passes a check.

    The window is the accepted drafts, then a token of the slim verifier. If the full model accepts
    that token, it would have rejected the draft in its place. If it rejects it, nobody knows.
    Without this, plain plans would be judged by other stretches of text than plans with windows.

    Args:
        num_drafted, num_slim_accepted: of the first round.
        num_window_tokens, num_full_accepted: of the window as the full model verified it.

    Returns:
        drafts that the full model would accept, and 1 if it would reject the next one, else 0.
    """
    verified = min(num_slim_accepted, num_window_tokens)
    if num_full_accepted < verified:
        return num_full_accepted, 1
    rejects = num_slim_accepted < num_full_accepted and num_slim_accepted < num_drafted
    return verified, int(rejects)


@dataclass(frozen=True)
class Situation:
    """What the plans of a batch are compared by.

    Attributes:
        rates, times, background: as `forecast_plans` takes them.
    """

    rates: AcceptanceRates
    times: StepTimes
    background: BackgroundLoad


class Estimates:
    """Estimates of everything that a forecast needs, from what the model runner reports.

    Args:
        max_draft_tokens: most tokens that the drafter may propose for a request at a time.
        drafts_again: whether the drafter is asked in all rounds of a window; else in the first.
    """

    def __init__(self, max_draft_tokens: int, drafts_again: bool = True) -> None:
        self.max_draft_tokens, self.drafts_again = max_draft_tokens, drafts_again
        self.reset_times()
        # Whether the drafter runs even if no draft is wanted.
        self._drafter_always_runs = False
        self._by_rule: defaultdict[str, RateEstimates] = defaultdict(RateEstimates)
        self._survival = SurvivalByConfidence()
        self._requests: dict[str, RateEstimates] = {}
        # Drafts of the first round of a request's window, and those that the slim verifier kept.
        self._first_round: dict[str, tuple[int, int]] = {}
        self._step = 0
        # Tokens that the full model has accepted or rejected.
        self._num_verified = 0

    def reset_times(self, new: Callable[[], PassTimeEstimator] = PassTimeEstimator) -> None:
        """Forgets all pass times."""
        self._full, self._slim, self._overhead = new(), new(), new()
        # By the bit length of the number of requests.
        self._draft: defaultdict[int, PassTimeEstimator] = defaultdict(new)

    def add(self, request_id: str, rule: str) -> None:
        """A request that will decode.

        Args:
            rule: `OFF`, `LOSSLESS` or `PAPER`.
        """
        if request_id not in self._requests:
            self._requests[request_id] = RateEstimates(rule)

    def remove(self, request_id: str) -> None:
        """The request has ended. What it taught about all requests stays."""
        self._requests.pop(request_id, None)
        self._first_round.pop(request_id, None)

    # --- observations ---------------------------------------------------------------------------

    def observe_full_pass(self, rows: int, seconds: float) -> None:
        """A pass of the full model over newest tokens, windows and drafts, without prompts."""
        self._full.observe(rows, seconds, self._step)

    def observe_slim_pass(self, rows: int, seconds: float) -> None:
        """A pass of the slim verifier and its check."""
        self._slim.observe(rows, seconds, self._step)

    def observe_draft_call(self, num_requests: int, num_draft_tokens: int, seconds: float) -> None:
        """A call of the drafter for so many draft tokens of each request. 0 is reported where the
        drafter runs anyway: a draft model has to fill its own KV cache."""
        times = self._draft[num_requests.bit_length()]
        times.observe(num_draft_tokens, seconds, self._step)
        self._drafter_always_runs |= num_draft_tokens == 0

    def observe_overhead(self, num_requests: int, seconds: float) -> None:
        """The time of a step that no pass took: scheduling, output."""
        self._overhead.observe(num_requests, seconds, self._step)

    def observe_slim_check(
        self,
        request_id: str,
        num_requested: int,
        num_drafted: int,
        num_accepted: int,
        num_escalated: int = 0,
        is_first_round: bool = True,
    ) -> None:
        """The slim verifier's check of one round of a request.

        Args:
            num_requested: drafts that were requested, at most as many as the window has room for.
            num_drafted: drafts that the drafter returned.
            num_accepted: leading drafts that the slim verifier accepted.
            num_escalated: of those, the ones that escalate (paper's rule).
        """
        hit_rate = "hit_rate" if is_first_round else "hit_rate_later"
        self._observe_hits(request_id, hit_rate, num_requested, num_drafted)
        if is_first_round:
            self._first_round[request_id] = num_drafted, num_accepted
        num_rejected = int(num_accepted < num_drafted)
        self._observe_rate(request_id, "accept_slim", num_accepted, num_rejected)
        num_kept = num_accepted + num_rejected - num_escalated
        self._observe_rate(request_id, "kept_rate", num_kept, num_escalated)

    def observe_full_check(
        self,
        request_id: str,
        num_proposed: int,
        num_accepted: int,
        is_tiered: bool,
        num_requested: int = 0,
        confidences: Sequence[float] = (),
    ) -> None:
        """The full model's check of a window or of plain drafts.

        Args:
            num_proposed: tokens of the window, or drafts.
            num_accepted: leading ones that the full model accepted.
            is_tiered: whether the slim verifier has checked them.
            num_requested: plain drafts that were requested; 0 if the drafter was not called.
            confidences: of the tokens of a lossless window.
        """
        for place, confidence in enumerate(confidences[: min(num_accepted + 1, num_proposed)]):
            self._survival.observe(confidence, place < num_accepted)
        if not is_tiered:
            self._observe_hits(request_id, "hit_rate", num_requested, num_proposed)
        num_rejected = int(num_accepted < num_proposed)
        rate = "accept_window" if is_tiered else "accept_full"
        self._observe_rate(request_id, rate, num_accepted, num_rejected)
        self._num_verified += num_accepted + num_rejected
        request = self._requests.get(request_id)
        if is_tiered and request is not None and request.rule == LOSSLESS:
            first = self._first_round.pop(request_id, (0, 0))
            judged = judge_drafts(*first, num_proposed, num_accepted)
            self._observe_rate(request_id, "accept_full", *judged)

    def _observe_hits(
        self, request_id: str, rate: str, num_requested: int, num_drafted: int
    ) -> None:
        if num_requested > 0:
            share = min(num_drafted / num_requested, 1.0)
            self._observe_rate(request_id, rate, share, 1 - share)

    def _observe_rate(self, request_id: str, rate: str, successes: float, failures: float) -> None:
        if successes + failures > 0:
            self.add(request_id, LOSSLESS)
            request = self._requests[request_id]
            request.of[rate].observe(successes, failures)
            self._by_rule[request.rule].of[rate].observe(successes, failures)

    # --- estimates ------------------------------------------------------------------------------

    def survival(self, request_id: str, confidences: Sequence[float]) -> float:
        """The probability that the full model keeps all tokens of a lossless window."""
        request = self._requests.get(request_id)
        usual = self.rate_of_rule(LOSSLESS, "accept_window")
        if request is not None:
            usual = request.of["accept_window"].estimate(usual, COMMON_TRIALS)
        return prod(self._survival.estimate(each, usual) for each in confidences)

    def rule_of(self, request_id: str) -> str:
        request = self._requests.get(request_id)
        return LOSSLESS if request is None else request.rule

    def rate_of_rule(self, rule: str, rate: str) -> float:
        """The rate of all requests with a rule."""
        estimates, prior, trials = self._by_rule[rule].of, PRIOR[rate], PRIOR_TRIALS
        if rate in EVIDENCE[rule]:
            other, max_trials = EVIDENCE[rule][rate]
            prior = estimates[other].estimate(prior, trials)
            trials += min(estimates[other].trials, max_trials)
        return estimates[rate].estimate(prior, trials)

    def rates_of_rules(self) -> dict[str, dict[str, float]]:
        """By rule and name, of the rules seen so far."""
        return {
            rule: {rate: self.rate_of_rule(rule, rate) for rate in PRIOR} for rule in self._by_rule
        }

    def acceptance(self, request_ids: Sequence[str]) -> AcceptanceRates:
        requests = [self._requests.get(request_id) or RateEstimates() for request_id in request_ids]
        common = {
            rule: {rate: self.rate_of_rule(rule, rate) for rate in PRIOR}
            for rule in {request.rule for request in requests}
        }
        rates = [_rates_of_request(request, common[request.rule]) for request in requests]
        bonus = [float(request.rule != PAPER) for request in requests]
        columns = dict(zip(PRIOR, np.array(rates).T, strict=True))
        return AcceptanceRates(**columns, adds_bonus_token=np.array(bonus))

    def draft_seconds(self, num_requests: int) -> np.ndarray:
        """`[D + 1]`, by the nearest number of requests that was observed."""
        if not self._draft:
            return np.zeros(self.max_draft_tokens + 1)
        size = num_requests.bit_length()
        nearest = min(self._draft, key=lambda observed: (abs(observed - size), observed))
        points = self._draft[nearest].points()
        if points[0][0] > 0:
            # A drafter that always runs takes about as long for no draft as for one.
            for_one = points[0][1] / points[0][0]
            points = [(0.0, for_one if self._drafter_always_runs else 0.0), *points]
        curve = PassTimeCurve(*zip(*points, strict=True))
        return np.asarray(curve(np.arange(self.max_draft_tokens + 1)))

    def overhead_seconds(self, num_requests: int) -> float:
        curve = self._overhead.curve()
        return float(curve(num_requests)) if curve else 0.0

    def remembers_slim_passes(self) -> bool:
        """Whether it is known what a slim pass takes."""
        return bool(self._slim.points(self._step))

    def has_tier(self, request_id: str) -> bool:
        return self.rule_of(request_id) != OFF

    def situation(
        self, request_ids: Sequence[str], num_others: int, sample_size: int
    ) -> Situation | None:
        """What the plans for these requests are compared by; None before the first full pass.

        Args:
            num_others: requests that decode beside them without drafts.
            sample_size: requests that represent all others of the batch.
        """
        times = self.step_times(len(request_ids), num_others)
        if times is None:
            return None
        tiered = [name for name in request_ids if self.has_tier(name)]
        plain = [name for name in request_ids if not self.has_tier(name)]
        if not tiered:
            tiered, plain = plain, []
        rates = self._sampled(tiered, sample_size)
        drafted = self._sampled(plain, sample_size) if plain else None
        background = BackgroundLoad.of(drafted, self.max_draft_tokens, num_others)
        return Situation(rates, times, background)

    def _sampled(self, request_ids: Sequence[str], sample_size: int) -> AcceptanceRates:
        """Of requests that represent all of these, and each rule by its share of them."""
        ordered = sorted(request_ids, key=self.rule_of)
        sample = ordered[:: -(-len(request_ids) // sample_size)]
        return replace(self.acceptance(sample), weight=len(request_ids) / len(sample))

    def step_times(self, num_drafting: int, num_others: int) -> StepTimes | None:
        """Of a batch with so many requests that have drafts and so many others. Until a slim pass
        was observed, and once that is forgotten, it is taken to be as long as a full one. None
        before the first full pass."""
        full = self._full.curve()
        if full is None:
            return None
        slim = self._slim_curve(full)
        overhead = self.overhead_seconds(num_drafting + num_others)
        draft = self.draft_seconds(num_drafting)
        later = None if self.drafts_again else np.zeros_like(draft)
        return StepTimes(draft, slim or full, full, overhead, later)

    def _slim_curve(self, full: PassTimeCurve) -> PassTimeCurve | None:
        """None before the first slim pass, and where the last one was so long ago that what it took
        says nothing any more.

        Below the sizes that were seen, slim passes are taken to follow full ones: after a crowd, a
        single request's would look as dear as the crowd's, and nobody would try. Above, they are
        taken to grow no faster than full ones, for the same reason.
        """
        points = self._slim.points(self._step)
        return PassTimeCurve(*zip(*points, strict=True)).completed_by(full) if points else None


def _rates_of_request(request: RateEstimates, common: dict[str, float]) -> list[float]:
    """In the order of `PRIOR`. `common` are the rates of all requests with the same rule."""
    rates = []
    for rate, prior in common.items():
        if rate in PAIRED:
            usual = common[PAIRED[rate]]
            paired = request.of[PAIRED[rate]].estimate(usual, COMMON_TRIALS)
            difference = _log_odds(paired) - _log_odds(usual)
            # odds' = odds exp(TRANSFER difference)
            prior = prior / (prior + (1 - prior) * exp(-TRANSFER * difference))
        rates.append(request.of[rate].estimate(prior, COMMON_TRIALS))
    return rates


def _log_odds(p: float) -> float:
    """Near 0 and 1, where small differences would look large, those of 0.01 and 0.99."""
    p = min(max(p, 0.01), 0.99)
    return log(p / (1 - p))
