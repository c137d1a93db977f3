# SPDX-License-Identifier: Apache-2.0
"""An engine without a model: pass times and acceptance rates are given, tokens are drawn, and a
`Planner` is told what the model runner would tell it. Plans can then be compared with the best ones
for the given rates, which the planner does not know.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from random import Random

from vllm_nvium.via_sd.planner.choose import Planner
from vllm_nvium.via_sd.planner.model import LOSSLESS, OFF, PAPER, DraftPlan


@dataclass
class RequestRates:
    """The rates of one request; the fields mean the same as in `AcceptanceRates`.

    Under the paper's rule a token escalates with probability `1 - accept_window`, and the full
    model replaces every such token.

    Attributes:
        hit_rate_later: None: `hit_rate`.
        off: the request has plain drafts and no slim tier.
    """

    accept_full: float
    accept_slim: float
    accept_window: float
    hit_rate: float = 1.0
    hit_rate_later: float | None = None
    off: bool = False

    def hit_rate_in(self, is_first_round: bool) -> float:
        if is_first_round or self.hit_rate_later is None:
            return self.hit_rate
        return self.hit_rate_later


@dataclass
class SimulatedEngine:
    """A batch that decodes for ever. The planner is told drawn outcomes. Tokens are counted by
    their expected value over the outcomes of the full model's checks, which has less noise.

    Attributes:
        requests: the rates of each.
        draft: seconds of one call of the drafter, by requests and draft tokens.
        slim, full: seconds of a pass, by rows.
        max_window: most tokens between two passes of the full model.
        paper: the paper's rule instead of the lossless one.
        seeded: the number of further requests, which are decoded without drafts.
        noise: relative standard deviation of every time that the planner is told.
        outliers: probability that such a time is `OUTLIER` times too long.
        confidence: c > 0: the tokens of a lossless window are kept with probabilities of their own,
            from a beta distribution with mean m = `accept_window` and parameters c m, c (1 - m),
            and the slim verifier is as sure of each as that. 0: all alike, and it says nothing.
        seed: of tokens and noise.
    """

    requests: Sequence[RequestRates]
    draft: Callable[[int, int], float]
    slim: Callable[[int], float]
    full: Callable[[int], float]
    max_window: int = 16
    paper: bool = False
    seeded: int = 0
    noise: float = 0.0
    outliers: float = 0.0
    confidence: float = 0.0
    seed: int = 0

    OUTLIER = 20.0

    def __post_init__(self) -> None:
        self.random = Random(self.seed)
        self.tokens = 0.0
        self.seconds = 0.0

    @property
    def names(self) -> list[str]:
        return [f"request {i}" for i in range(len(self.requests))]

    def run(self, planner: Planner, steps: int) -> float:
        """Tokens per second over so many steps. Outliers are told and not counted."""
        tokens, seconds = self.tokens, self.seconds
        for name, request in zip(self.names, self.requests, strict=True):
            planner.add(name, OFF if request.off else PAPER if self.paper else LOSSLESS)
        for _ in range(steps):
            self.step(planner, planner.plan(self.names, len(self.requests) + self.seeded))
        return (self.tokens - tokens) / (self.seconds - seconds)

    def step(self, planner: Planner, plan: DraftPlan) -> None:
        """One step as planned."""
        if plan.rounds:
            self._tiered(planner, plan)
        else:
            self._plain(planner, plan)

    def _plain(self, planner: Planner, plan: DraftPlan) -> None:
        most = plan.num_draft_tokens
        self._draft(planner, len(self.requests), most)
        drafted = [most * self._hits(request.hit_rate) for request in self.requests]
        self._full_pass(planner, len(self.requests) + sum(drafted))
        for i, num_drafted in enumerate(drafted):
            self._check_plain(planner, i, num_drafted, most)

    def _full_pass(self, planner: Planner, rows: int) -> None:
        """Every seeded request has a row and gets a token."""
        rows += self.seeded
        planner.observe_full_pass(rows, self._timed(self.full(rows)))
        self.tokens += self.seeded

    def _check_plain(self, planner: Planner, i: int, num_drafted: int, num_requested: int) -> None:
        """The full model's check of drafts that the slim verifier has not seen."""
        rate = self.requests[i].accept_full
        accepted = self._accepted(rate, num_drafted)
        planner.observe_full_check(self.names[i], num_drafted, accepted, False, num_requested)
        self.tokens += 1 + _expected(num_drafted, rate)

    def _tiered(self, planner: Planner, plan: DraftPlan) -> None:
        count, most = len(self.requests), plan.num_draft_tokens
        windows, kept = [0] * count, [0] * count
        chances: list[list[float]] = [[] for _ in range(count)]  # of each token of a window
        plain = {
            i: most * self._hits(request.hit_rate)
            for i, request in enumerate(self.requests)
            if request.off
        }
        tiered = [i for i in range(count) if i not in plain]
        still_open = tiered
        drafting = count  # the first call of the drafter is for all requests
        rounds = 0
        while still_open:
            self._draft(planner, drafting, most)
            requested = [min(most, self.max_window - windows[i] - 1) for i in still_open]
            is_first = rounds == 0
            drafted = [
                wanted * self._hits(self.requests[i].hit_rate_in(is_first))
                for i, wanted in zip(still_open, requested, strict=True)
            ]
            of_round = list(zip(still_open, requested, drafted, strict=True))
            if self.paper:
                # What the slim verifier alone has seen may not be kept: no drafts, no round.
                for i, wanted, found in of_round:
                    if not found:
                        name = self.names[i]
                        planner.observe_slim_check(name, wanted, 0, 0, is_first_round=is_first)
                of_round = [each for each in of_round if each[2]]
            if not of_round:
                break
            still_open = self._round(planner, of_round, windows, kept, chances, is_first)
            drafting = len(still_open)
            rounds += 1
            lengths, names = [windows[i] for i in still_open], [self.names[i] for i in still_open]
            if self.confidence and not self.paper:
                survivals = [planner.survival(self.names[i], chances[i]) for i in still_open]
                goes_on = planner.another_round(lengths, rounds, names, survivals)
            else:
                goes_on = planner.another_round(lengths, rounds, names)
            if not goes_on:
                break
        self._full_pass(planner, count + sum(windows) + sum(plain.values()))
        for i, num_drafted in plain.items():
            self._check_plain(planner, i, num_drafted, most)
        for i in tiered:
            known = chances[i] if self.confidence and not self.paper else ()
            planner.observe_full_check(
                self.names[i], windows[i], kept[i], rounds > 0, confidences=known
            )
            self.tokens += 1
            if not self.paper:
                self.tokens += sum(accumulate(chances[i], mul))

    def _round(
        self,
        planner: Planner,
        of_round: list[tuple[int, int, int]],
        windows: list[int],
        kept: list[int],
        chances: list[list[float]],
        is_first: bool,
    ) -> list[int]:
        """One slim check of (request, drafts wanted, drafts) each; returns the requests whose
        windows stay open."""
        rows = len(of_round) + sum(found for _, _, found in of_round)
        planner.observe_slim_pass(rows, self._timed(self.slim(rows)))
        going = []
        for i, wanted, count in of_round:
            request = self.requests[i]
            accepted = self._accepted(request.accept_slim, count)
            # Under the paper's rule the slim verifier adds no token behind accepted drafts.
            length = accepted + int(accepted < count or not self.paper)
            of_tokens = [self._chance(request.accept_window) for _ in range(length)]
            fails = [self.random.random() >= chance for chance in of_tokens]
            chances[i] += of_tokens
            escalated = sum(fails) if self.paper else 0
            planner.observe_slim_check(self.names[i], wanted, count, accepted, escalated, is_first)
            if kept[i] == windows[i]:
                kept[i] += fails.index(True) if any(fails) else length
            windows[i] += length
            if self.paper:
                self.tokens += _expected(length, request.accept_window)
            if length > 0 and not escalated and windows[i] < self.max_window:
                going.append(i)
        return going

    def _chance(self, mean: float) -> float:
        """That the full model keeps a token of a window."""
        if not self.confidence or self.paper or not 0 < mean < 1:
            return mean
        return self.random.betavariate(self.confidence * mean, self.confidence * (1 - mean))

    def _draft(self, planner: Planner, num_requests: int, num_draft_tokens: int) -> None:
        if num_draft_tokens:
            seconds = self._timed(self.draft(num_requests, num_draft_tokens))
            planner.observe_draft_call(num_requests, num_draft_tokens, seconds)

    def _accepted(self, rate: float, num_drafted: int) -> int:
        for accepted in range(num_drafted):
            if self.random.random() >= rate:
                return accepted
        return num_drafted

    def _hits(self, rate: float) -> bool:
        return rate >= 1 or self.random.random() < rate

    def _timed(self, seconds: float) -> float:
        self.seconds += seconds
        if self.noise:
            seconds *= max(1 + self.noise * self.random.gauss(0, 1), 0.1)
        if self.outliers and self.random.random() < self.outliers:
            seconds *= self.OUTLIER
        return seconds


def _expected(num_drafted: int, rate: float) -> float:
    """Expected number of leading tokens that are accepted."""
    return sum(rate**k for k in range(1, num_drafted + 1))
