# SPDX-License-Identifier: Apache-2.0
"""The windows of all requests of an engine: how many drafts are asked for, the rounds of slim
checks that grow them, and what the next step of the full model verifies. It knows a model runner
by the protocol `StepView` only, so that another runner needs that and no more.
"""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from vllm_nvium.engine.request_metrics import TokenNotes
from vllm_nvium.engine.stats import Reporter
from vllm_nvium.model_executor.ops.tiers import ESCALATE
from vllm_nvium.model_executor.rows import Rows
from vllm_nvium.model_executor.via_sd.policy import check_round, kept_unasked
from vllm_nvium.model_executor.via_sd.step import Drafts, Window, extend, rooms
from vllm_nvium.via_sd.first_rank import PlansOfFirstRank, shared
from vllm_nvium.via_sd.options import AUTO, ViaSDOptions
from vllm_nvium.via_sd.planner.choose import Planner
from vllm_nvium.via_sd.planner.estimators import WindowSurvival
from vllm_nvium.via_sd.planner.fixed import FixedRounds
from vllm_nvium.via_sd.planner.model import DraftPlan
from vllm_nvium.via_sd.request_metrics import DRAFTER, FULL, SLIM
from vllm_nvium.via_sd.requests import ViaSDRequests
from vllm_nvium.via_sd.stats import ViaSDCounts
from vllm_nvium.via_sd.step_view import StepView

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams


class Session(TokenNotes):
    """See above. It notes whose word each new token was, `DRAFTER`, `SLIM` or `FULL`: all of them
    are what the full model says itself, save those that the paper's rule keeps.

    Args:
        options: of the engine.
        can_draft_again: see `StepView`; behind a drafter that cannot, the slim verifier goes on
            alone.
    """

    def __init__(self, options: ViaSDOptions, can_draft_again: bool) -> None:
        self.options = options
        self.planner: Planner | FixedRounds | PlansOfFirstRank = shared(
            Planner(
                options.drafts,
                options.window,
                drafts_again=can_draft_again,
                max_batch=options.max_batch,
            )
            if options.rounds == AUTO
            else FixedRounds(options.drafts, int(options.rounds), options.max_batch)
        )
        self.requests = ViaSDRequests()
        super().__init__(self.requests.asked, "via_sd")
        self.reporter = Reporter(ViaSDCounts.zero(options.window))
        self.plan = DraftPlan(options.drafts, 0)
        # Whether the step does nothing but decode; the drafts that it verifies, by request.
        self.is_decode = False
        self.verified: dict[str, Sequence[int]] = {}
        # Drafts that were asked for the last step and go straight to the full model.
        self.asked: dict[str, int] = {}
        self.room: int | None = None  # see `begin_step`
        self.draft_seconds = self._step_start = 0.0
        self._step_end: float | None = None

    @property
    def counts(self) -> ViaSDCounts:
        """Since the engine was started."""
        return self.reporter.counts

    def report(self) -> dict[str, Any]:
        """What is new since the last report."""
        plan = self.plan
        report = self.reporter.report(drafts=plan.num_draft_tokens, rounds=plan.rounds)
        return self.with_notes(report)

    # --- requests -------------------------------------------------------------------------------

    def add(self, request_id: str, params: "SamplingParams") -> None:
        """A new request, or one whose conversation goes on."""
        request = self.requests.add(request_id, params, self.options)
        # A session that goes on may have changed its rule.
        self.planner.remove(request_id)
        self.planner.add(request_id, request.rule)

    def remove(self, request_id: str) -> None:
        self.requests.remove(request_id)
        self.planner.remove(request_id)

    # --- one step -------------------------------------------------------------------------------

    def begin_step(
        self,
        scheduled: dict[str, int],
        drafts: dict[str, Sequence[int]],
        decoding: set[str],
        room: int | None = None,
    ) -> None:
        """The full model is about to run.

        Args:
            scheduled: rows of each request; drafts: those that are verified among them.
            decoding: requests that have generated a token before.
            room: tokens that drafts of all requests may take in a step like this; None: enough.
        """
        self.room = room
        self._step_start = time.perf_counter()
        # The last token of a prompt is one row too.
        self.is_decode = bool(scheduled) and all(
            name in decoding and rows == 1 + len(drafts.get(name, ()))
            for name, rows in scheduled.items()
        )
        self.verified = drafts
        if self.is_decode and self._step_end is not None:
            self.planner.observe_overhead(len(scheduled), self._step_start - self._step_end)
        self._step_end = None

    def end_step(self) -> None:
        self._step_end = time.perf_counter()

    def kept(self, request_ids: Sequence[str], num_draft_tokens: Sequence[int]) -> list[bool]:
        """For each draft of the step whether the paper's rule keeps it without asking the full
        model."""
        kept: list[bool] = []
        for request_id, count in zip(request_ids, num_draft_tokens, strict=False):
            window = self.requests.window(request_id)
            drafts = self.verified.get(request_id, ())
            kept += kept_unasked(window, drafts) if len(drafts) == count else [False] * count
        return kept

    def drafting(self, view: StepView) -> list[str]:
        """Requests that decode in the next step and may have drafts in it."""
        ids = view.request_ids
        requests = [self.requests.get(request_id) for request_id in ids]
        return [
            ids[i]
            for i, request in enumerate(requests)
            if not view.unfinished[i] and request is not None and not view.one_at_a_time[i]
        ]

    def plan_drafts(self, view: StepView) -> tuple[list[str], int]:
        """Who may have drafts, and how many the drafter is to propose for each."""
        if not (request_ids := self.drafting(view)):
            # All read their prompts or go one token at a time: nobody is to have drafts.
            self.asked = {}
            return request_ids, 0
        # The scheduler cuts what has no room, and it would look as if the drafter had not had it.
        most = self.options.window if self.room is None else self.room // len(request_ids)
        decoding = len(view.request_ids) - int(sum(view.unfinished))
        plan = self.planner.plan(request_ids, decoding, most) if most else DraftPlan(0, 0)
        self.plan = DraftPlan(min(plan.num_draft_tokens, most), plan.rounds)
        self.asked = dict.fromkeys(request_ids, self.plan.num_draft_tokens)
        return request_ids, self.plan.num_draft_tokens

    def observe_drafter(self, num_requests: int, count: int, seconds: float) -> None:
        """The drafter has answered for the first round."""
        self.draft_seconds = seconds
        # A draft model reads prompts, too, which has nothing to do with drafts.
        if self.is_decode and num_requests:
            self.planner.observe_draft_call(num_requests, count, seconds)

    def observe_step(
        self, request_ids: Sequence[str], sampled: Sequence[Sequence[int]], asked: dict[str, int]
    ) -> None:
        """What the pass of the full model taught; the drafts of its requests are gone then.

        Args:
            sampled: new tokens of each request.
            asked: drafts that each request was to get, of those that the slim tier did not check.
        """
        if self.is_decode:
            seconds = time.perf_counter() - self._step_start - self.draft_seconds
            rows = len(request_ids) + sum(map(len, self.verified.values()))
            self.planner.observe_full_pass(rows, seconds)
            self.counts.full_passes += 1
        for request_id, tokens in zip(request_ids, sampled, strict=True):
            drafts = self.verified.get(request_id, ())
            request = self.requests.get(request_id)
            if tokens and self.wants(request_id):
                self.note(request_id, *self._whose(request_id, len(tokens)))
            if not tokens or request is None:
                continue
            if self.is_decode:
                self.counts.turns += 1
                self.counts.tokens += len(tokens)
            if not drafts and request_id not in asked:
                continue
            window = request.window
            accepted = len(tokens) - 1
            if window is not None:
                self.counts.observe_window(len(drafts), accepted)
                if window.is_paper:
                    for tier in window.tiers[: len(drafts)]:
                        self.counts.tiers[tier] += 1
            self.planner.observe_full_check(
                request_id,
                len(drafts),
                accepted,
                window is not None,
                asked.get(request_id, 0),
                () if window is None or window.is_paper else window.confidences,
            )
        # Requests that had no turn in this step still wait with their drafts.
        self.requests.forget_drafts(request_ids)

    def _whose(self, request_id: str, count: int) -> tuple[list[int], int]:
        """Whose word each of the new tokens of a request is: the last is the full model's. And how
        many rounds of slim checks were behind them."""
        drafts = list(self.verified.get(request_id, ()))[: count - 1]
        window = self.requests.window(request_id)
        whose, rounds = [DRAFTER] * len(drafts), 0
        # vLLM may have replaced a window when the request was preempted.
        if window is not None and drafts == window.tokens[: len(drafts)]:
            whose = [DRAFTER if drafted else SLIM for drafted in window.drafted[: len(drafts)]]
            rounds = window.rounds
        return [*whose, FULL], rounds

    # --- the window -----------------------------------------------------------------------------

    def grow(self, view: StepView, tokens: list[list[int]]) -> list[Window]:
        """Rounds of slim checks on the drafter's answers.

        Args:
            tokens: of every request, in batch order.

        Returns:
            the windows of requests that may use the tier; those that got a round hold the drafts
            for the next step.
        """
        if not (windows := self.open_windows(view)):
            return windows
        drafts = Drafts([tokens[window.request] for window in windows])
        for window in windows:
            self.asked.pop(view.request_ids[window.request], None)
        current, done = windows, 0
        # Whether the drafter has been asked in every round so far. One that was left out of a round
        # has not seen that round's tokens, and is not asked again.
        is_asked = view.can_draft_again
        survival = WindowSurvival(self.planner.survival)
        while True:
            current, drafts = self._with_a_round(view, current, drafts)
            if not current:
                break
            hidden, rows = self.check(view, current, drafts)
            done += 1
            # Positions in `current` of those that go on.
            going = [i for i, window in enumerate(current) if window.is_open]
            lengths = [len(current[i].tokens) for i in going]
            names = [view.request_ids[current[i].request] for i in going]
            survivals = [
                1.0 if window.is_paper else survival(name, window.confidences)
                for name, window in zip(names, (current[i] for i in going), strict=True)
            ]
            if not going or not self.planner.another_round(lengths, done, names, survivals):
                break
            found = self._draft_again(view, current, going, hidden, rows) if is_asked else None
            is_asked = found is not None
            drafts = Drafts([[] for _ in going]) if found is None else found
            current = [current[i] for i in going]
        return windows

    def _with_a_round(
        self, view: StepView, windows: list[Window], drafts: Drafts
    ) -> tuple[list[Window], Drafts]:
        """The windows that have a round, with as many drafts as they have room for. Where the
        drafter has none, the slim verifier's own token makes a round, but not under the paper's
        rule: nobody but the slim verifier would ever have seen such a token.
        """
        drafts = drafts.trimmed(rooms(windows, view.max_slim_rows))
        kept = []
        for i, (window, tokens) in enumerate(zip(windows, drafts.tokens, strict=True)):
            if window.is_paper and not tokens:
                is_first = window.rounds == 0
                self._observe_slim_check(view, window, window.room, 0, 0, is_first)
            else:
                kept.append(i)
        return [windows[i] for i in kept], drafts.of(kept)

    def leave_tier_off(self) -> None:
        """There is no slim verifier: drafts go straight to the full model."""
        options = self.options
        self.planner = shared(
            Planner(options.drafts, options.window, max_rounds=0)
            if options.rounds == AUTO
            else FixedRounds(options.drafts, 0)
        )

    def hand_over(self, request_ids: Sequence[str], windows: Sequence[Window]) -> None:
        """The next step verifies the tokens of these windows; each has had a round."""
        for window in windows:
            self.requests.requests[request_ids[window.request]].window = window
            window.noise.clear()

    def open_windows(self, view: StepView) -> list[Window]:
        """One for each request that may use the tier in this step."""
        windows = []
        for row, request_id in enumerate(view.request_ids):
            request = self.requests.get(request_id)
            if request is None or not request.is_tiered:
                continue
            if view.unfinished[row] or view.one_at_a_time[row]:
                continue
            position, newest, generated = view.newest(row)
            left = (request.params.max_tokens or view.max_model_len) - generated
            # The full model adds one token of its own behind the window.
            limit = min(self.options.window, left - 1, view.max_model_len - position - 1)
            if limit < 1 or newest in request.stop_tokens:
                continue
            windows.append(
                Window(
                    request=row,
                    position=position,
                    newest=newest,
                    limit=limit,
                    is_paper=request.options.mode == "paper",
                    accept=request.options.accept,
                    escalate=request.options.escalate,
                    stop_tokens=request.stop_tokens,
                )
            )
        if windows and self.room is not None:
            names = {view.request_ids[window.request] for window in windows}
            others = sum(count for name, count in self.asked.items() if name not in names)
            most = (self.room - others) // len(windows)
            if most < 2:  # one draft each goes to the full model without a slim pass
                return []
            for window in windows:
                window.limit = min(window.limit, most)
        return windows

    def check(
        self, view: StepView, windows: list[Window], drafts: Drafts
    ) -> tuple[torch.Tensor, list[Rows]]:
        """One slim pass and what it leaves: the windows grow.

        Returns:
            hidden states [T, H] of the pass and its rows per KV cache group.
        """
        start = time.perf_counter()
        hidden, rows, logits = view.run_slim(windows, drafts)
        draws = view.draw_slim(windows, drafts, logits)
        found = check_round(windows, drafts, draws)
        accepted = found.accepted.tolist()
        rooms = [window.room for window in windows]
        is_first = windows[0].rounds == 0
        extend(windows, drafts, draws, found)
        num_rows = len(windows) + sum(map(len, drafts.tokens))
        self.planner.observe_slim_pass(num_rows, time.perf_counter() - start)
        self.counts.slim_passes += 1
        for window, room, tokens, kept in zip(windows, rooms, drafts.tokens, accepted, strict=True):
            self.counts.slim_drafted += len(tokens)
            self.counts.slim_accepted += kept - _escalated(window)
            self._observe_slim_check(view, window, room, len(tokens), kept, is_first)
        return hidden, rows

    def _observe_slim_check(
        self,
        view: StepView,
        window: Window,
        room: int,
        drafted: int,
        accepted: int,
        is_first: bool,
    ) -> None:
        """One round of a window that had room for so many tokens."""
        asked = max(min(self.plan.num_draft_tokens, room - 1), 0)
        name = view.request_ids[window.request]
        self.planner.observe_slim_check(
            name, asked, drafted, accepted, _escalated(window), is_first
        )

    def _draft_again(
        self,
        view: StepView,
        windows: list[Window],
        going: list[int],
        hidden: torch.Tensor,
        rows: list[Rows],
    ) -> Drafts | None:
        """The drafter goes on from where the windows that are still open end; None if there is
        nothing that it could propose."""
        start = time.perf_counter()
        room = max(windows[i].room for i in going) - 1
        # A draft model may read fewer positions than the target.
        longest = max(windows[i].last_position for i in going)
        count = min(self.plan.num_draft_tokens, room, view.drafter_max_model_len - 1 - longest)
        if count < 1:
            return None
        drafts = view.draft_again(windows, going, hidden, rows, count)
        self.planner.observe_draft_call(len(going), count, time.perf_counter() - start)
        return drafts


def _escalated(window: Window) -> int:
    """Tokens that the paper's rule leaves to the full model; a window ends with the first round
    that has such a token."""
    return window.tiers.count(ESCALATE) if window.is_paper else 0
