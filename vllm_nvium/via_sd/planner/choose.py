# SPDX-License-Identifier: Apache-2.0
"""Chooses the plan of every step: the one with the highest forecast, and now and then another one
to learn about it (`trials.py`), so that a slim tier that does not pay costs little.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from vllm_nvium.via_sd.planner.estimate import Estimates, Situation
from vllm_nvium.via_sd.planner.estimators import MIN_SAMPLES
from vllm_nvium.via_sd.planner.model import (
    NONE,
    PLAIN,
    TIERED,
    DraftPlan,
    Forecast,
    forecast_plans,
    one_round,
)
from vllm_nvium.via_sd.planner.trials import (
    FIRST_PLANS,
    FIRST_TRIAL,
    MAX_OWED_STEPS,
    MAX_SAVED_STEPS,
    MIN_TRIALS,
    NEEDS,
    TRIAL,
    TRIAL_FADE,
    TRIAL_INTERVAL,
    UNPAID_TRIAL,
    Patience,
    TrialLength,
    best_plan,
    lost_seconds,
)

# A plan is kept for this many steps; where many requests come and go, for half as many.
REFRESH_STEPS = 8
# The factor by which another plan has to be better, to replace one of its own or of another kind.
PLAN_MARGIN, KIND_MARGIN = 1.003, 1.015

# The largest array of a forecast has B D L^2 cells, for B requests, D draft tokens and L window
# lengths. One of MAX_CELLS takes a millisecond or two, so that larger batches are sampled:
#     B = clip(MAX_CELLS / (D L^2), MIN_SAMPLE, MAX_SAMPLE)
# With more than MAX_CELLS all the same, a plan is kept as many times longer, up to MAX_STRETCH.
MIN_SAMPLE, MAX_SAMPLE = 4, 8
MAX_CELLS = MAX_SAMPLE * 8 * 15**2
MAX_STRETCH = 32


class Planner(Estimates):
    """Chooses the plan of the next step by what was observed in the last ones.

    The same calls always give the same plans: there is no clock and no randomness in it.

    Args:
        max_draft_tokens: most tokens that the drafter may propose for a request at a time.
        max_window: most tokens between two passes of the full model.
        max_rounds: most rounds of a window; as many as it has tokens by default.
        drafts_again: whether the drafter is asked in all rounds of a window; else in the first.
        max_batch: no slim tier while more requests than this decode.
        trial_budget: share of the time that trials may lose, beside those that `Patience` allows.
    """

    def __init__(
        self,
        max_draft_tokens: int,
        max_window: int,
        *,
        max_rounds: int | None = None,
        drafts_again: bool = True,
        max_batch: int | None = None,
        trial_budget: float = 0.01,
    ) -> None:
        super().__init__(max_draft_tokens, drafts_again)
        self.max_window, self.max_batch = max_window, max_batch
        self.max_rounds = max_window if max_rounds is None else min(max_rounds, max_window)
        self.trial_budget = trial_budget
        # The plan of this step, and the one that is used between trials.
        self._plan = self._used = DraftPlan(0, 0)
        # Forecasts for the latter: tokens per second, seconds per step. 0 while nothing is known.
        self._used_rate = self._used_seconds = 0.0
        self._situation: Situation | None = None
        # Requests that decode without drafts.
        self._num_others = 0
        # Requests with drafts, and others, that the plan was made for, and the tokens of a request
        # that steps had room for.
        self._planned_for, self._window = (0, 0), max_window
        # Those of the last steps: where one has little room, such as for a prompt, it passes.
        self._rooms: deque[int] = deque(maxlen=REFRESH_STEPS // 2)
        self._last_choice = self._next_choice = 0
        # The trial that runs, its steps so far, and `_num_verified` when it began.
        self._trial: TrialLength | None = None
        self._trial_steps = self._verified_before = 0
        self._last_trial: dict[str, int] = {}  # number of the step, by kind
        self._patience = Patience()
        self._budget_seconds = 0.0
        self._steps_of = {NONE: 0, PLAIN: 0, TIERED: 0}
        # By request: s and q of `another_round`, the mean length of a round, and the hit rate.
        self._round_gains: dict[str, tuple[float, float, float, float]] = {}

    def remove(self, request_id: str) -> None:
        super().remove(request_id)
        self._round_gains.pop(request_id, None)

    # --- decisions ------------------------------------------------------------------------------

    def plan(
        self, request_ids: Sequence[str], num_decoding: int = 0, most: int | None = None
    ) -> DraftPlan:
        """The plan of the next step. Called once per step.

        Args:
            request_ids: requests that decode and may have drafts. Without any the last plan stays.
            num_decoding: all requests that decode, with or without drafts.
            most: tokens of each that a step verifies, where that may be less than a whole window.
        """
        if not request_ids:
            return self._plan
        self._rooms.append(self.max_window if most is None else min(most, self.max_window))
        self._num_others = max(num_decoding - len(request_ids), 0)
        self._step += 1
        if self._trial is not None:
            is_due = self._trial_is_over(self._trial)
        else:
            is_due = self._step >= self._next_choice or self._is_resized(len(request_ids))
        if is_due or self._plan.kind not in self._possible_kinds(request_ids):
            self._choose(request_ids)
        self._trial_steps += self._trial is not None
        # In steps of now: what a crowd's trials have lost would take a single request for ever.
        self._budget_seconds = min(
            max(self._budget_seconds, -MAX_OWED_STEPS * self._used_seconds)
            + self.trial_budget * self._used_seconds,
            MAX_SAVED_STEPS * self._used_seconds,
        )
        self._steps_of[self._plan.kind] += 1
        return self._plan

    def another_round(
        self,
        window_lengths: Sequence[int],
        rounds_done: int,
        request_ids: Sequence[str],
        survivals: Sequence[float] | None = None,
    ) -> bool:
        """Whether one more round is worth its time. Called after each round.

        The round adds s^w q tokens to a window of w tokens, where q are the accepted tokens of
        `one_round` and s is the probability that the full model accepts a token (1 under the
        paper's rule); where it is known how sure the slim verifier was of each token, `survivals`
        stand for s^w. It is worth its time if it brings them at the rate that the plan promises.
        The gain falls with w, so that it is enough to look one round ahead.

        Args:
            window_lengths: tokens of the windows that are open: neither full nor escalated.
            rounds_done: rounds of these windows.
            request_ids: in the same order.
            survivals: the probability that the full model keeps all tokens of each window.
        """
        if not request_ids or rounds_done >= min(self._plan.rounds, self.max_rounds):
            return False
        if self._trial is not None or self._situation is None:
            return True
        self._add_round_gains(request_ids)
        num_drafts, situation = self._plan.num_draft_tokens, self._situation
        gained = added = drafted = 0.0
        rows = situation.background.rows[num_drafts]
        for i, (request_id, length) in enumerate(zip(request_ids, window_lengths, strict=True)):
            survives, accepted, mean_length, hit_rate = self._round_gains[request_id]
            survival = survives**length if survivals is None else survivals[i]
            # A window may have more room by now than when the plan was made.
            left = max(self._window - length, 1)
            drafted += min(num_drafts, left - 1) * hit_rate
            room = min(left, mean_length)
            gained += accepted * room / mean_length * survival
            added += room
            rows += 1 + length
        times = situation.times
        before, after = times.full((rows, rows + added))
        cost = (
            times.draft_in_round(rounds_done)[num_drafts]
            + times.slim(len(request_ids) + drafted)
            + after
            - before
        )
        return bool(gained > self._used_rate * cost)

    def forecast(self, request_ids: Sequence[str]) -> Forecast | None:
        """Every plan's, as `forecast_plans` arranges them; None before the first full pass."""
        situation = self._situation_of(request_ids)
        if situation is None:
            return None
        return self._forecast(situation, self._possible_kinds(request_ids))

    def snapshot(self) -> dict[str, Any]:
        """For logs and benchmarks: estimates, plan and trials, as plain values."""
        return {
            "seconds": {
                "full": dict(self._full.points()),
                "slim": dict(self._slim.points(self._step)),
                "draft": self.draft_seconds(self._planned_for[0]).tolist(),
                "overhead": self.overhead_seconds(sum(self._planned_for)),
            },
            "acceptance": self.rates_of_rules(),
            "plan": {"num_draft_tokens": self._plan.num_draft_tokens, "rounds": self._plan.rounds},
            "is_trial": self._trial is not None,
            "tokens_per_second": self._used_rate,
            "steps": dict(self._steps_of),
            "trial_seconds_left": self._budget_seconds,
        }

    # --- the batch ------------------------------------------------------------------------------

    def _is_resized(self, num_requests: int) -> bool:
        """Whether half of the batch has come or gone since the plan was made, or an eighth where
        that was some steps ago: a forecast may take a tenth of a step."""
        counts = zip((num_requests, self._num_others), self._planned_for, strict=True)
        changed, size = sum(abs(now - then) for now, then in counts), sum(self._planned_for)
        is_old = 2 * (self._step - self._last_choice) >= REFRESH_STEPS
        return changed * 2 >= max(size, 1) or (is_old and changed * 8 > size)

    def _possible_kinds(self, request_ids: Sequence[str]) -> list[str]:
        if self.max_draft_tokens == 0:
            return [NONE]
        num_decoding = len(request_ids) + self._num_others
        is_too_large = self.max_batch is not None and num_decoding > self.max_batch
        has_tier = self.max_rounds > 0 and self._window > 1 and any(map(self.has_tier, request_ids))
        if is_too_large or not has_tier:
            return [NONE, PLAIN]
        return [NONE, PLAIN, TIERED]

    def _situation_of(self, request_ids: Sequence[str]) -> Situation | None:
        return self.situation(request_ids, self._num_others, self._sample_size())

    def _cells_per_request(self) -> int:
        lengths = self.max_window if self.max_rounds > 1 else 1
        return (self.max_draft_tokens + 1) * lengths**2

    def _sample_size(self) -> int:
        return max(min(MAX_CELLS // self._cells_per_request(), MAX_SAMPLE), MIN_SAMPLE)

    def _refresh_steps(self, num_requests: int) -> int:
        cells = min(num_requests, self._sample_size()) * self._cells_per_request()
        return REFRESH_STEPS * min(-(-cells // MAX_CELLS), MAX_STRETCH)

    def _forecast(self, situation: Situation, kinds: Sequence[str]) -> Forecast:
        found = forecast_plans(
            situation.rates,
            situation.times,
            self._window,
            self.max_rounds,
            situation.background,
            with_tier=TIERED in kinds,
        )
        found.tokens[self._window + 1 :] = 0.0  # drafts that a step has no room for
        return found

    def _add_round_gains(self, request_ids: Sequence[str]) -> None:
        missing = [name for name in request_ids if name not in self._round_gains]
        if missing:
            rates = self.acceptance(missing).in_later_rounds()
            found = one_round(rates, np.array([self._plan.num_draft_tokens]))
            survives = np.where(rates.adds_bonus_token > 0, rates.accept_window, 1.0)
            gains = zip(
                survives, found.accepted[:, 0], found.length[:, 0], rates.hit_rate, strict=True
            )
            self._round_gains.update(zip(missing, gains, strict=True))

    # --- the choice -----------------------------------------------------------------------------

    def _choose(self, request_ids: Sequence[str]) -> None:
        """Sets the plan of the next steps, or begins a trial."""
        self._planned_for, self._last_choice = (len(request_ids), self._num_others), self._step
        self._next_choice = self._step + self._refresh_steps(len(request_ids))
        self._window = max(*self._rooms, 1)
        self._round_gains.clear()
        kinds = self._possible_kinds(request_ids)
        self._situation = self._situation_of(request_ids)
        forecast = None if self._situation is None else self._forecast(self._situation, kinds)
        self._end_trial(forecast)
        untried = [kind for kind in kinds if kind not in self._last_trial]
        if untried:
            self._begin_trial(self._first_plan(untried[0]), FIRST_TRIAL)
        elif forecast is not None:
            best = {kind: best_plan(forecast, kind) for kind in kinds}
            self._use_best(forecast, best)
            kind, length = self._due_trial(forecast, best)
            if kind is not None:
                for estimates in (*self._by_rule.values(), *self._requests.values()):
                    for rate in NEEDS[kind]:
                        estimates.of[rate].fade(TRIAL_FADE)
                plan = best[kind]
                if length is UNPAID_TRIAL:
                    # What the best plan goes by may be long over.
                    plan = self._first_plan(kind)
                    self._patience.has_tried(kind, sum(self._planned_for))
                self._begin_trial(plan, length)
        else:
            # No step has done nothing but decode, so that no time is known.
            self._plan = self._used

    def _first_plan(self, kind: str) -> DraftPlan:
        first = FIRST_PLANS[kind]
        num_drafts = min(first.num_draft_tokens, self.max_draft_tokens, self._window)
        return DraftPlan(num_drafts, min(first.rounds, self.max_rounds))

    def _use_best(self, forecast: Forecast, best: dict[str, DraftPlan]) -> None:
        """Replaces the plan in use by the best one of its kind or, if its rates are known, of
        another kind, where the forecast is better by the margin."""
        rates = forecast.rates
        if self._used.kind not in best:
            self._used = DraftPlan(self._used.num_draft_tokens, 0)
        same_kind = best[self._used.kind]
        if rates[same_kind.cell] > rates[self._used.cell] * PLAN_MARGIN:
            self._used = same_kind
        least = rates[self._used.cell] * KIND_MARGIN
        for kind, plan in best.items():
            if rates[plan.cell] > least and self._is_known(kind):
                self._used, least = plan, rates[plan.cell]
        self._last_trial[self._used.kind] = self._step
        self._patience.has_used(self._used.kind, sum(self._planned_for))
        self._used_rate = float(rates[self._used.cell])
        self._used_seconds = float(forecast.seconds[self._used.cell])
        self._plan = self._used

    def _is_known(self, kind: str) -> bool:
        """Whether the rates that a kind of plan depends on have enough trials, under any rule, and
        what a slim pass takes is not forgotten."""
        if kind == TIERED and not self.remembers_slim_passes():
            return False
        return all(
            max(estimates.of[rate].trials for estimates in self._by_rule.values()) >= MIN_TRIALS
            for rate in NEEDS[kind]
        )

    # --- trials ---------------------------------------------------------------------------------

    def _due_trial(
        self, forecast: Forecast, best: dict[str, DraftPlan]
    ) -> tuple[str | None, TrialLength]:
        """The kind of plan whose last trial is the oldest, if it is time for one and the budget
        covers it, or if it was not tried for too long; and the length of the trial. What slim
        passes would lose is not known where their times are forgotten."""
        for kind in sorted(best, key=self._last_trial.__getitem__):
            if kind == self._used.kind:
                continue
            steps = self._step - self._last_trial[kind]
            is_foreseen = kind != TIERED or self.remembers_slim_passes()
            if (
                steps >= TRIAL_INTERVAL[kind]
                and is_foreseen
                and lost_seconds(forecast, best[kind]) <= self._budget_seconds
            ):
                return kind, TRIAL
            if steps >= self._patience.steps(kind, sum(self._planned_for)):
                return kind, UNPAID_TRIAL
        return None, TRIAL

    def _begin_trial(self, plan: DraftPlan, length: TrialLength) -> None:
        self._plan, self._trial = plan, length
        self._trial_steps, self._verified_before = 0, self._num_verified
        self._last_trial[plan.kind] = self._step

    def _trial_is_over(self, trial: TrialLength) -> bool:
        judged = self._num_verified - self._verified_before
        has_enough = self._plan.kind == NONE or judged >= trial.enough_tokens
        return self._trial_steps >= (MIN_SAMPLES if has_enough else trial.max_steps)

    def _end_trial(self, forecast: Forecast | None) -> None:
        """Takes from the budget what the trial has lost, by what it taught, if it was the budget
        that allowed it."""
        # One that steps have no room for by now has no forecast.
        if self._trial is TRIAL and forecast is not None and forecast.tokens[self._plan.cell]:
            self._budget_seconds -= lost_seconds(forecast, self._plan, self._trial_steps)
        self._trial = None
