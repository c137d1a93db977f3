# SPDX-License-Identifier: Apache-2.0
"""When a kind of plan that is not in use is tried, with which plan, and for how long. What the
trials lose stays within a budget; a kind for which it never suffices is tried all the same, seldom
and ever more seldom.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from vllm_nvium.via_sd.planner.estimators import MIN_SAMPLES
from vllm_nvium.via_sd.planner.model import NONE, PLAIN, TIERED, DraftPlan, Forecast

# What each kind of plan is tried with first.
FIRST_PLANS = {NONE: DraftPlan(0, 0), PLAIN: DraftPlan(4, 0), TIERED: DraftPlan(2, 2)}
# The rates that a kind of plan depends on; it is used once each of them has this many trials.
NEEDS: dict[str, tuple[str, ...]] = {
    NONE: (),
    PLAIN: ("accept_full",),
    # A drafter that never has drafts teaches nothing about the slim verifier's judgement of them.
    TIERED: ("accept_window",),
}
MIN_TRIALS = 16.0
# Steps between two trials of the same kind. Plain decoding has no acceptance rate to learn, so that
# it needs them far less often.
TRIAL_INTERVAL = {NONE: 45 * 40, PLAIN: 40, TIERED: 40}
# The share of what is known about a kind of plan that its next trial keeps.
TRIAL_FADE = 0.75
# The trial budget saves up the time of this many steps at most, and owes that of so many.
MAX_SAVED_STEPS, MAX_OWED_STEPS = 3, 10


@dataclass(frozen=True)
class TrialLength:
    """A trial ends after `max_steps` steps, or after `MIN_SAMPLES`, which its medians need, once
    the full model has judged `enough_tokens`."""

    max_steps: int
    enough_tokens: int


# The first trial of a kind is longer: before it nothing is known. The third, which `Patience`
# allows, has only the steps that medians of times need.
FIRST_TRIAL, TRIAL, UNPAID_TRIAL = TrialLength(15, 30), TrialLength(8, 24), TrialLength(8, 0)


class Patience:
    """Steps after which a kind of plan that was not tried meanwhile is tried whatever that loses:
    what made it look dear may be over, and nothing else would show that. Each such trial doubles
    the number, each choice that puts the kind in use halves it. What a crowd has lost says nothing
    of a single request, so batches that differ by a factor of two or more have numbers of their
    own.

    The least number is more than the steps that `PassTimeEstimator` remembers and those between two
    choices, so that such a trial's times are not mixed with older ones.
    """

    LEAST, MOST = 2400, 38400

    def __init__(self) -> None:
        self._steps: defaultdict[tuple[str, int], int] = defaultdict(lambda: self.LEAST)

    def steps(self, kind: str, num_requests: int) -> int:
        return self._steps[kind, num_requests.bit_length()]

    def has_tried(self, kind: str, num_requests: int) -> None:
        key = kind, num_requests.bit_length()
        self._steps[key] = min(2 * self._steps[key], self.MOST)

    def has_used(self, kind: str, num_requests: int) -> None:
        key = kind, num_requests.bit_length()
        self._steps[key] = max(self._steps[key] // 2, self.LEAST)


def best_plan(forecast: Forecast, kind: str) -> DraftPlan:
    rates = forecast.rates
    if kind == NONE:
        return DraftPlan(0, 0)
    if kind == PLAIN:
        return DraftPlan(1 + int(rates[1:, 0].argmax()), 0)
    drafts, rounds = np.unravel_index(int(rates[:, 1:].argmax()), rates[:, 1:].shape)
    return DraftPlan(int(drafts), 1 + int(rounds))


def lost_seconds(forecast: Forecast, plan: DraftPlan, steps: int = MIN_SAMPLES) -> float:
    """What steps of a plan lose against the best plan."""
    share = 1 - float(forecast.rates[plan.cell] / forecast.rates.max())
    return steps * float(forecast.seconds[plan.cell]) * share
