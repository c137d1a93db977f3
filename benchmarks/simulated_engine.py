# SPDX-License-Identifier: Apache-2.0
"""An engine without a model: pass times and acceptances are given, tokens are drawn, and a
`RoundController` is told what the model runner would tell it. With it the controller can be judged
on what it cannot see.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from vllm_nvium.via_sd.planner import LOSSLESS, OFF, PAPER, Plan, RoundController


@dataclass
class Chances:
    """Of one request, per token; the fields mean the same as in `controller.Acceptance`.

    Under the paper's rule `1 - slim` of the tokens escalate, and the full model replaces those.
    With `off` it has drafts and no slim tier.
    """

    at_full: float
    at_slim: float
    slim: float
    obtained: float = 1.0
    again: float | None = None
    off: bool = False

    def __post_init__(self) -> None:
        if self.again is None:
            self.again = self.obtained


@dataclass
class SimulatedEngine:
    """A batch that decodes for ever. The controller is told of drawn outcomes; the tokens that
    count are the mean over what the full model may do to them, which has less noise.

    Attributes:
        requests: chances of each.
        draft: seconds of one call of the drafter, by requests and drafts.
        slim, full: seconds of a pass, by rows.
        max_window: most tokens between two full passes.
        paper: the rule of the paper instead of the lossless one.
        seeded: more requests, that are decoded without drafts.
        noise: relative, of every time that the controller is told.
        outliers: chance that such a time is `OUTLIER` times too long.
        seed: of tokens and noise.
    """

    requests: Sequence[Chances]
    draft: Callable[[int, int], float]
    slim: Callable[[int], float]
    full: Callable[[int], float]
    max_window: int = 16
    paper: bool = False
    seeded: int = 0
    noise: float = 0.0
    outliers: float = 0.0
    seed: int = 0

    OUTLIER = 20.0

    def __post_init__(self) -> None:
        self.random = Random(self.seed)
        self.tokens = 0.0
        self.seconds = 0.0

    @property
    def names(self) -> list[str]:
        return [f"request {i}" for i in range(len(self.requests))]

    def run(self, controller: RoundController, steps: int) -> float:
        """Tokens per second over so many steps; outliers are told but do not count."""
        tokens, seconds = self.tokens, self.seconds
        for name, request in zip(self.names, self.requests, strict=True):
            controller.add(name, OFF if request.off else PAPER if self.paper else LOSSLESS)
        for _ in range(steps):
            self.step(controller, controller.plan(self.names, len(self.requests) + self.seeded))
        return (self.tokens - tokens) / (self.seconds - seconds)

    def step(self, controller: RoundController, plan: Plan) -> None:
        """One step as planned."""
        if plan.rounds:
            self._tiered(controller, plan)
        else:
            self._plain(controller, plan)

    def _plain(self, controller: RoundController, plan: Plan) -> None:
        self._draft(controller, len(self.requests), plan.drafts)
        drafted = [plan.drafts * self._hits(request.obtained) for request in self.requests]
        self._full_pass(controller, len(self.requests) + sum(drafted))
        for i, proposed in enumerate(drafted):
            self._check_plain(controller, i, proposed, plan.drafts)

    def _full_pass(self, controller: RoundController, rows: int) -> None:
        """Seeded requests have a row and get a token in each."""
        rows += self.seeded
        controller.saw_full(rows, self._timed(self.full(rows)))
        self.tokens += self.seeded

    def _check_plain(self, controller: RoundController, i: int, proposed: int, asked: int) -> None:
        """The full model's check of drafts that nobody else has checked."""
        chance = self.requests[i].at_full
        accepted = self._accepted(chance, proposed)
        controller.saw_full_check(self.names[i], proposed, accepted, tiered=False, asked=asked)
        self.tokens += 1 + _accepted_of(proposed, chance)

    def _tiered(self, controller: RoundController, plan: Plan) -> None:
        count = len(self.requests)
        windows, kept = [0] * count, [0] * count
        plain = {
            i: plan.drafts * self._hits(request.obtained)
            for i, request in enumerate(self.requests)
            if request.off
        }
        tiered = [i for i in range(count) if i not in plain]
        still_open = tiered
        asking = count  # requests that the drafter answers
        rounds = 0
        while still_open:
            self._draft(controller, asking, plan.drafts)
            asked = [min(plan.drafts, self.max_window - windows[i] - 1) for i in still_open]
            is_first = rounds == 0
            drafted = [
                count * self._hits(self._obtained(i, is_first))
                for i, count in zip(still_open, asked, strict=True)
            ]
            if not any(drafted):
                for i, count in zip(still_open, asked, strict=True):
                    controller.saw_slim_check(self.names[i], count, 0, 0, is_first=is_first)
                break
            still_open = self._round(
                controller, still_open, asked, drafted, windows, kept, is_first
            )
            asking = len(still_open)
            rounds += 1
            lengths, names = [windows[i] for i in still_open], [self.names[i] for i in still_open]
            if not controller.another_round(lengths, rounds, names):
                break
        self._full_pass(controller, count + sum(windows) + sum(plain.values()))
        for i, proposed in plain.items():
            self._check_plain(controller, i, proposed, plan.drafts)
        for i in tiered:
            controller.saw_full_check(self.names[i], windows[i], kept[i], tiered=rounds > 0)
            self.tokens += 1
            if not self.paper:
                self.tokens += _accepted_of(windows[i], self.requests[i].slim)

    def _round(
        self,
        controller: RoundController,
        still_open: list[int],
        asked: list[int],
        drafted: list[int],
        windows: list[int],
        kept: list[int],
        is_first: bool,
    ) -> list[int]:
        """One slim check; returns the requests whose windows go on."""
        rows = len(still_open) + sum(drafted)
        controller.saw_slim(rows, self._timed(self.slim(rows)))
        going = []
        for i, wanted, count in zip(still_open, asked, drafted, strict=True):
            request = self.requests[i]
            accepted = self._accepted(request.at_slim, count)
            # Under the paper's rule the slim verifier only draws again what it refuses.
            length = accepted + int(accepted < count or not self.paper)
            fails = [self.random.random() >= request.slim for _ in range(length)]
            escalated = sum(fails) if self.paper else 0
            controller.saw_slim_check(self.names[i], wanted, count, accepted, escalated, is_first)
            if kept[i] == windows[i]:
                kept[i] += fails.index(True) if any(fails) else length
            windows[i] += length
            if self.paper:
                self.tokens += _accepted_of(length, request.slim)
            if length > 0 and not escalated and windows[i] < self.max_window - 1:
                going.append(i)
        return going

    def _draft(self, controller: RoundController, count: int, drafts: int) -> None:
        if drafts:
            controller.saw_draft(count, drafts, self._timed(self.draft(count, drafts)))

    def _accepted(self, chance: float, proposed: int) -> int:
        for accepted in range(proposed):
            if self.random.random() >= chance:
                return accepted
        return proposed

    def _obtained(self, i: int, is_first: bool) -> float:
        request = self.requests[i]
        found = request.obtained if is_first else request.again
        assert found is not None
        return found

    def _hits(self, chance: float) -> bool:
        return chance >= 1 or self.random.random() < chance

    def _timed(self, seconds: float) -> float:
        self.seconds += seconds
        if self.noise:
            seconds *= max(1 + self.noise * self.random.gauss(0, 1), 0.1)
        if self.outliers and self.random.random() < self.outliers:
            seconds *= self.OUTLIER
        return seconds


def _accepted_of(proposed: int, chance: float) -> float:
    """Leading tokens that are accepted, on the mean."""
    return sum(chance**k for k in range(1, proposed + 1))
