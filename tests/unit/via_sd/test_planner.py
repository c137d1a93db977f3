# SPDX-License-Identifier: Apache-2.0
"""Drafts and rounds by measured times and acceptances: formulas, estimates, and the controller on a
simulated engine."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated_engine import Chances, SimulatedEngine

from vllm_nvium.via_sd.planner import (
    LOSSLESS,
    OFF,
    PAPER,
    Acceptance,
    Beside,
    Curve,
    PassTimes,
    Plan,
    RoundController,
    Share,
    Times,
    judged_drafts,
    plain_outlook,
    round_length,
    round_survival,
    tiered_outlook,
)

FULL = 0.02  # seconds of a full pass
DRAFTERS = {
    "draft model": (0.9, 0.25),
    "small draft model": (0.8, 0.1),
    "n-gram": (0.5, 0.0),
    "head": (0.75, 0.05),
}
SLIM_COSTS = (0.3, 0.4, 0.55, 0.7)
AGREEMENTS = (0.8, 0.9, 0.95, 0.98)


class FixedPlan(RoundController):
    """The same plan for ever, and every round of it."""

    def __init__(self, plan: Plan, max_window: int) -> None:
        super().__init__(max(plan.drafts, 1), max_window)
        self.fixed = plan

    def plan(self, request_ids: Sequence[str], decoding: int = 0) -> Plan:
        return self.fixed

    def another_round(
        self, window_lengths: Sequence[int], rounds_done: int, request_ids: Sequence[str]
    ) -> bool:
        return bool(request_ids) and rounds_done < self.fixed.rounds


def flat(seconds: float) -> Curve:
    return Curve([1.0], [seconds])


def acceptance(chances: Sequence[Chances], paper: bool = False) -> Acceptance:
    def column(kind: str) -> np.ndarray:
        return np.array([getattr(chance, kind) for chance in chances])

    kinds = ("at_full", "at_slim", "slim", "slim", "obtained", "again")
    own = np.full(len(chances), float(not paper))
    return Acceptance(*map(column, kinds), own)


def one(at_full: float, slim: float = 0.9, paper: bool = False) -> Acceptance:
    return acceptance([Chances(at_full, at_full, slim)], paper)


def relative_times(drafts: int, draft: float, slim: float) -> Times:
    """In full passes."""
    return Times(np.arange(drafts + 1) * draft, flat(slim), flat(1.0))


def make_engine(
    chances: Sequence[Chances], draft: float, slim: float, **options: object
) -> SimulatedEngine:
    return SimulatedEngine(
        chances,
        lambda requests, drafts: draft * FULL * drafts,
        lambda rows: slim * FULL,
        lambda rows: FULL,
        **options,  # type: ignore[arg-type]
    )


# --- Formulas -------------------------------------------------------------------------------------


def lengths_of_a_round(accept: float, drafts: int, own: int) -> dict[int, float]:
    """Chance of each length, by going through all outcomes of all drafts."""
    chances: dict[int, float] = {}
    for outcome in itertools.product((True, False), repeat=drafts):
        kept = next((i for i, good in enumerate(outcome) if not good), drafts)
        length = kept + 1 if kept < drafts else drafts + own
        chance = prod(accept if good else 1 - accept for good in outcome)
        chances[length] = chances.get(length, 0.0) + chance
    return chances


@pytest.mark.parametrize("own", [0, 1])
@pytest.mark.parametrize("drafts", [0, 1, 4])
@pytest.mark.parametrize("accept", [0.0, 0.55, 1.0])
def test_a_round_by_enumeration(accept: float, drafts: int, own: int) -> None:
    lengths = lengths_of_a_round(accept, drafts, own)
    assert sum(lengths.values()) == pytest.approx(1)
    mean = sum(length * chance for length, chance in lengths.items())
    assert round_length(accept, drafts, own) == pytest.approx(mean, rel=1e-6)
    for keep in (0.0, 0.7, 1.0):
        wanted = sum(keep**length * chance for length, chance in lengths.items())
        assert round_survival(accept, keep, drafts, own) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("slim", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("drafts,rounds", [(1, 1), (3, 1), (2, 3)])
def test_tokens_of_a_window_by_enumeration(drafts: int, rounds: int, slim: float) -> None:
    lengths = lengths_of_a_round(0.6, drafts, 1)
    wanted = 0.0
    for window in itertools.product(lengths, repeat=rounds):
        kept = sum(slim**k for k in range(sum(window) + 1))
        wanted += prod(lengths[length] for length in window) * kept
    found = tiered_outlook(one(0.6, slim), relative_times(drafts, 0.1, 0.4), 40, rounds)
    assert found.tokens[-1, -1] == pytest.approx(wanted, rel=1e-6)


MIXED = [Chances(0.8, 0.85, 0.95), Chances(0.5, 0.6, 0.8, 0.7), Chances(0.7, 0.9, 0.9)]
OFTEN_WITHOUT_DRAFTS = [Chances(0.8, 0.8, 0.95, 0.4)]
# Where an n-gram was found the next one mostly is.
IN_RUNS = [Chances(0.8, 0.8, 0.95, 0.3, 0.8)]
TWO_IN_RUNS = [Chances(0.8, 0.8, 0.95, 0.3, 0.8), Chances(0.6, 0.7, 0.9, 0.5, 0.9)]
PLANS = [Plan(0, 0), Plan(3, 0), Plan(2, 1), Plan(3, 2), Plan(1, 4), Plan(4, 3)]


@pytest.mark.parametrize(
    "chances",
    [MIXED, OFTEN_WITHOUT_DRAFTS, IN_RUNS, TWO_IN_RUNS],
    ids=["three", "one", "in runs", "two in runs"],
)
@pytest.mark.parametrize("paper", [False, True])
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_outlooks_against_a_simulation(plan: Plan, paper: bool, chances: Sequence[Chances]) -> None:
    """Tokens, and the seconds of passes that grow with their rows, up to windows that are full."""
    slim, full = Curve([1.0, 17.0], [0.3, 0.5]), Curve([1.0, 33.0], [1.0, 1.6])
    engine = SimulatedEngine(chances, lambda n, d: 0.1 * d, slim, full, 12, paper)
    steps = 12000
    rate = engine.run(FixedPlan(plan, 12), steps)
    times = Times(np.arange(plan.drafts + 1) * 0.1, slim, full)
    if plan.rounds:
        outlook = tiered_outlook(acceptance(chances, paper), times, 12, 12)
        cell: tuple[int, ...] = (plan.drafts - 1, plan.rounds - 1)
    else:
        outlook, cell = plain_outlook(acceptance(chances, paper), times), (plan.drafts,)
    assert engine.tokens / steps == pytest.approx(outlook.tokens[cell], rel=0.03)
    assert rate == pytest.approx(outlook.rates[cell], rel=0.04)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_requests_without_the_tier_wait_for_it(plan: Plan) -> None:
    """Two that have drafts and no tier and three without drafts, beside two that have all."""
    tiered, plain = MIXED[:2], [replace(chances, off=True) for chances in (*IN_RUNS, MIXED[2])]
    slim, full = Curve([1.0, 17.0], [0.3, 0.5]), Curve([1.0, 65.0], [1.0, 2.2])
    both = [plain[0], *tiered, plain[1]]
    engine = SimulatedEngine(both, lambda n, d: 0.1 * d, slim, full, 12, seeded=3)
    steps = 12000
    rate = engine.run(FixedPlan(plan, 12), steps)
    times = Times(np.arange(plan.drafts + 1) * 0.1, slim, full)
    beside = Beside.of(acceptance(plain), plan.drafts, 3)
    if plan.rounds:
        outlook = tiered_outlook(acceptance(tiered), times, 12, 12, beside)
        cell: tuple[int, ...] = (plan.drafts - 1, plan.rounds - 1)
    else:
        outlook, cell = plain_outlook(acceptance(tiered), times, beside), (plan.drafts,)
    assert engine.tokens / steps == pytest.approx(outlook.tokens[cell], rel=0.03)
    assert rate == pytest.approx(outlook.rates[cell], rel=0.04)


def test_some_requests_stand_for_all() -> None:
    times = Times(np.arange(4) * 0.1, Curve([1.0, 99.0], [0.3, 1.0]), Curve([1.0, 99.0], [1, 3]))
    for paper in (False, True):
        eight = acceptance([Chances(0.6, 0.7, 0.9, 0.8)] * 8, paper)
        two = replace(acceptance([Chances(0.6, 0.7, 0.9, 0.8)] * 2, paper), weight=4)
        pairs = [
            (plain_outlook(eight, times), plain_outlook(two, times)),
            (tiered_outlook(eight, times, 8, 8), tiered_outlook(two, times, 8, 8)),
        ]
        for all_, sample in pairs:
            np.testing.assert_allclose(sample.tokens, all_.tokens)
            np.testing.assert_allclose(sample.seconds, all_.seconds)


@pytest.mark.parametrize("name", DRAFTERS)
def test_agrees_with_the_simplest_model_of_tiers(name: str) -> None:
    """The usual formulas take a window's mean length for its length, which is exact for rounds of
    one length and too good for others."""
    accept, cost = DRAFTERS[name]
    plain = plain_outlook(one(accept), relative_times(24, cost, 1.0)).rates
    per = [(1 - accept ** (d + 1)) / (1 - accept) for d in range(25)]
    assert plain == pytest.approx([per[d] / (1 + d * cost) for d in range(25)], rel=1e-6)
    for slim_cost, agreement in itertools.product(SLIM_COSTS, AGREEMENTS):
        times = relative_times(12, cost, slim_cost)
        found = tiered_outlook(one(accept, agreement), times, 60, 4).rates
        sure = tiered_outlook(one(1.0, agreement), times, 60, 4).rates
        for d, rounds in itertools.product(range(1, 13), range(1, 5)):
            seconds = 1 + rounds * (d * cost + slim_cost)
            mean = (1 - agreement ** (per[d] * rounds + 1)) / (1 - agreement) / seconds
            assert 0.85 * mean <= found[d - 1, rounds - 1] <= mean * (1 + 1e-6)
            exact = (1 - agreement ** ((d + 1) * rounds + 1)) / (1 - agreement) / seconds
            assert sure[d - 1, rounds - 1] == pytest.approx(exact, rel=1e-5)


# --- Estimates ------------------------------------------------------------------------------------


def test_what_was_not_tried_does_not_count() -> None:
    """Checks of 4 drafts stop at the first failure; their acceptance per token comes out anyway."""
    share = Share()
    random = np.random.default_rng(0)
    for _ in range(3000):
        outcome = random.random(4) < 0.7
        kept = 4 if outcome.all() else int(outcome.argmin())
        share.saw(kept, int(kept < 4))
    assert share.good / share.all == pytest.approx(0.7, abs=0.03)
    assert share.all > 900, "nothing has changed, so nothing was forgotten at once"
    assert Share().estimate(0.6, 2) == 0.6
    assert share.estimate(0.6, 1e9) == pytest.approx(0.6, abs=1e-4)


def test_a_share_that_changes_is_noticed() -> None:
    for before, after in ((0.6, 0.95), (0.95, 0.6), (0.9, 0.0)):
        share = Share()
        random = np.random.default_rng(0)
        for step in range(2400):
            good = random.random() < (before if step < 2000 else after)
            share.saw(int(good), int(not good))
        assert share.good / share.all == pytest.approx(after, abs=0.1)


def test_slow_passes_change_nothing() -> None:
    times = PassTimes()
    random = np.random.default_rng(0)
    for step in range(300):
        rows = int(random.integers(1, 40))
        seconds = (1 + max(rows - 16, 0) / 16) * random.normal(1, 0.05)
        times.saw(rows, seconds * (30 if random.random() < 0.1 else 1), step)
    curve = times.curve()
    assert curve is not None
    assert curve(4) == pytest.approx(1, rel=0.05)
    assert curve(36) == pytest.approx(1 + 20 / 16, rel=0.15)
    rows = np.arange(0, 64)
    assert (np.diff(curve(rows)) >= 0).all()


def test_one_slow_pass_of_a_size_of_its_own() -> None:
    times = PassTimes()
    for step in range(20):
        times.saw(4, 1.0, step)
    times.saw(9, 50.0, 20)
    curve = times.curve()
    assert curve is not None and curve(9) == 1.0


def test_pass_times_follow_what_changes_and_forget_the_rest() -> None:
    times = PassTimes(memory=100)
    for step in range(60):
        times.saw(2, 1.0, step)
        times.saw(9, 2.0, step)
    for step in range(60, 80):
        times.saw(2, 3.0, step)
    curve = times.curve()
    assert curve is not None and 2 <= curve(2) == curve(9) <= 3, "one is not above the other"
    times.saw(2, 3.0, 200)
    curve = times.curve()
    assert curve is not None and curve(2) == curve(9) == 3.0


def test_curves_go_on_beyond_what_was_seen() -> None:
    assert flat(2.0)(np.array([0.0, 1.0, 500.0])).tolist() == [2, 2, 2]
    assert Curve([10.0, 12.0], [1.0, 2.0])(100) == 2, "the slope of neighbours may be noise"
    assert Curve([10.0, 20.0], [1.0, 2.0])(100) == pytest.approx(10)


def test_draft_times() -> None:
    controller = RoundController(5, 8)
    assert controller._draft_seconds(1).tolist() == [0] * 6
    for _ in range(5):
        controller.saw_draft(1, 2, 0.4)
    assert controller._draft_seconds(1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    for _ in range(5):
        controller.saw_draft(1, 4, 0.6)
        controller.saw_draft(32, 4, 1.6)
    assert controller._draft_seconds(1) == pytest.approx([0, 0.2, 0.4, 0.5, 0.6, 0.75])
    assert controller._draft_seconds(40)[4] == pytest.approx(1.6)


TOKEN = st.integers(0, 2)


@given(
    text=st.lists(TOKEN, min_size=9, max_size=9),
    slim=st.lists(TOKEN, min_size=9, max_size=9),
    drafts=st.lists(TOKEN, max_size=4),
    more=st.lists(TOKEN, max_size=3),
    cut=st.integers(0, 9),
)
def test_windows_tell_of_drafts_what_the_text_says(
    text: list[int], slim: list[int], drafts: list[int], more: list[int], cut: int
) -> None:
    """Of greedy checks: never anything else than plain drafts would have shown, and all of it
    unless both models refuse the same draft or the window was cut."""

    def matches(tokens: list[int], of: list[int]) -> int:
        pairs = enumerate(zip(tokens, of, strict=False))
        return next((i for i, (a, b) in pairs if a != b), len(tokens))

    kept = matches(drafts, slim)
    window = [*drafts[:kept], slim[kept], *more][:cut]
    accepted, direct = matches(window, text), matches(drafts, text)
    good, bad = judged_drafts(len(drafts), kept, len(window), accepted)
    assert good <= direct
    if bad:
        assert good == direct < len(drafts)
    elif kept < len(window):
        assert good == kept and (kept == len(drafts) or slim[kept] != text[kept])


def test_windows_teach_what_plain_drafts_would() -> None:
    """Greedily only: at other temperatures a token that the full model takes does not mean that it
    would have refused another, and the paper's rule does not ask it."""
    for rule, greedy in ((LOSSLESS, True), (LOSSLESS, False), (PAPER, True)):
        controller = RoundController(4, 8)
        controller.add("a", rule, is_greedy=greedy)
        for _ in range(60):
            controller.saw_slim_check("a", 4, 4, 2)
            controller.saw_slim_check("a", 4, 4, 4, is_first=False)
            controller.saw_full_check("a", 8, 5, tiered=True)
        known = controller._common[rule].at_full
        if greedy and rule == LOSSLESS:
            assert known.good / known.all == pytest.approx(2 / 3), "two kept, the third refused"
        else:
            assert known.all == 0


def test_slow_moments_of_the_machine_do_not_count_against_what_was_seen_in_them() -> None:
    """Drafts 4 at a time were seen while it was fast, 2 at a time while it was twice as slow."""
    controller = RoundController(4, 8)
    controller.saw_full(5, 3.0)  # the first of all is mostly slow
    for slow, drafts in ((1.0, 4), (2.0, 2)):
        for _ in range(20):
            controller.saw_full(5, 0.1 * slow)
            controller.saw_slim(3, 0.05 * slow)
            controller.saw_draft(1, drafts, 0.02 * drafts * slow)
    by_drafts = controller._draft_seconds(1)
    assert by_drafts[2] == pytest.approx(by_drafts[4] / 2, rel=0.15)
    assert controller._slim.points()[0][1] == pytest.approx(0.05, rel=0.05)


def test_drafters_that_are_called_for_no_drafts() -> None:
    """A draft model keeps its KV cache up to date: plain decoding is not for nothing there."""
    controller = RoundController(4, 8)
    for _ in range(20):
        controller.saw_full(1, 0.1)
        controller.saw_draft(8, 2, 0.08)
    assert controller._draft_seconds(8).tolist() == pytest.approx([0.0, 0.04, 0.08, 0.12, 0.16])
    for _ in range(20):
        controller.saw_draft(8, 0, 0.05)
        controller.saw_draft(1, 2, 0.06)
    assert controller._draft_seconds(8)[:3].tolist() == pytest.approx([0.05, 0.065, 0.08])
    assert controller._draft_seconds(1)[0] == pytest.approx(0.03), "never seen for one request"


def test_slim_passes_that_alone_get_slower_do_count() -> None:
    controller = RoundController(4, 8)
    for slow in (1.0, 2.0):
        for _ in range(20):
            controller.saw_full(5, 0.1)
            controller.saw_slim(3, 0.05 * slow)
    assert controller._slim.points()[0][1] == pytest.approx(0.1)


def test_what_the_papers_rule_keeps_says_nothing_of_plain_drafts() -> None:
    """It keeps nearly all; taken for the full model's opinion, plain drafts looked as good."""
    believed = {}
    for rule in (LOSSLESS, PAPER):
        controller = RoundController(4, 8)
        controller.add("a", rule)
        for _ in range(60):
            controller.saw_slim_check("a", 4, 4, 4)
        believed[rule] = controller._share(rule, "at_full")
        assert controller._share(rule, "again") > 0.95, "drafts found once are found again"
    assert believed[LOSSLESS] > 0.9
    assert believed[PAPER] == pytest.approx(RoundController(4, 8)._share(PAPER, "at_full"))


def test_one_acceptance_of_a_request_tells_of_the_other() -> None:
    controller = RoundController(4, 8)
    for name, good in (("usual", 3), ("easy", 4), ("hard", 1)):
        controller.add(name, LOSSLESS)
        for _ in range(40):
            controller.saw_full_check(name, 4, good, tiered=False)
    for _ in range(40):
        controller.saw_slim_check("usual", 4, 4, 3)
    controller.add("new", LOSSLESS)
    found = controller._acceptance(["new", "usual", "easy", "hard"])
    new, usual, easy, hard = found.at_slim
    assert new == pytest.approx(controller._share(LOSSLESS, "at_slim"))
    assert hard < new - 0.05 and easy > new + 0.05, "nobody asked the slim verifier about them"
    assert usual == pytest.approx(0.75, abs=0.03), "what it said itself counts for more"


# --- The controller on a simulated engine ---------------------------------------------------------

MAX_DRAFTS, MAX_WINDOW = 8, 16
RUNS = 4


def best_rates(
    chances: Sequence[Chances], draft: float, slim: float, paper: bool = False
) -> tuple[float, float]:
    """The best plain and the best tiered plan, tokens per full pass."""
    times = relative_times(MAX_DRAFTS, draft, slim)
    plain = plain_outlook(acceptance(chances, paper), times)
    tiered = tiered_outlook(acceptance(chances, paper), times, MAX_WINDOW, MAX_WINDOW)
    return float(plain.rates.max()), float(tiered.rates.max())


@pytest.mark.parametrize("paper", [False, True])
@pytest.mark.parametrize("name", DRAFTERS)
def test_takes_the_side_that_wins(name: str, paper: bool) -> None:
    """Over 1000 steps after a start of 400, trials included, on the mean of some runs: one of them
    is lucky or unlucky by half a per cent. Sides within a few per cent of each other are mistaken
    for some time, hence a bound for each cell and a stricter one for all."""
    accept, draft = DRAFTERS[name]
    shares = []
    costs = SLIM_COSTS[::2] if paper else SLIM_COSTS
    for slim, agreement in itertools.product(costs, AGREEMENTS):
        chances = [Chances(accept, accept, agreement)]
        rate = tiered_share = 0.0
        for seed in range(RUNS):
            engine = make_engine(
                chances, draft, slim, paper=paper, noise=0.05, outliers=0.01, seed=seed
            )
            controller = RoundController(MAX_DRAFTS, MAX_WINDOW)
            engine.run(controller, 400)
            tokens, seconds = engine.tokens, engine.seconds
            for _ in range(50):
                engine.run(controller, 20)
                tiered_share += (controller._used.rounds > 0) / 50 / RUNS
            rate += (engine.tokens - tokens) / (engine.seconds - seconds) * FULL / RUNS
        plain, tiered = best_rates(chances, draft, slim, paper)
        where = f"slim {slim} at {agreement}: {rate:.2f} of {plain:.2f} and {tiered:.2f}"
        shares.append(rate / max(plain, tiered))
        assert rate >= 0.96 * plain, where
        assert rate >= 0.95 * max(plain, tiered), where
        if tiered > 1.05 * plain:
            assert tiered_share > 0.5, where
        if plain > 1.05 * tiered:
            assert tiered_share < 0.5, where
    assert np.mean(shares) >= 0.98


def test_follows_what_changes() -> None:
    """A slim tier that gets good, one that gets bad, and a drafter that does."""
    good, bad = Chances(0.8, 0.8, 0.97), Chances(0.8, 0.8, 0.6)
    for before, after, uses in ((bad, good, True), (good, bad, False)):
        engine = make_engine([before], 0.1, 0.35, noise=0.05)
        controller = RoundController(MAX_DRAFTS, MAX_WINDOW)
        engine.run(controller, 1000)
        assert (controller._used.rounds > 0) != uses
        engine.requests = [after]
        engine.run(controller, 1000)
        rate = engine.run(controller, 1000) * FULL
        assert rate >= 0.93 * max(best_rates([after], 0.1, 0.35))
        assert (controller._used.rounds > 0) == uses
    useless, useful = Chances(0.02, 0.02, 0.5), Chances(0.9, 0.9, 0.5)
    engine = make_engine([useless], 0.1, 0.6, noise=0.05)
    controller = RoundController(MAX_DRAFTS, MAX_WINDOW)
    engine.run(controller, 1000)
    assert engine.run(controller, 500) * FULL >= 0.97, "plain decoding brings 1"
    engine.requests = [useful]
    engine.run(controller, 1000)
    assert engine.run(controller, 500) * FULL >= 0.93 * max(best_rates([useful], 0.1, 0.6))


def test_follows_pass_times_that_change() -> None:
    engine = make_engine([Chances(0.8, 0.8, 0.95)], 0.1, 0.9, noise=0.05)
    controller = RoundController(MAX_DRAFTS, MAX_WINDOW)
    engine.run(controller, 1000)
    assert controller.snapshot()["steps"]["tiered"] < 100
    engine.slim = lambda rows: 0.3 * FULL
    engine.run(controller, 1500)
    before = controller.snapshot()["steps"]["tiered"]
    engine.run(controller, 500)
    assert controller.snapshot()["steps"]["tiered"] - before > 350


@pytest.mark.parametrize("uses", [True, False])
def test_outliers_flip_nothing(uses: bool) -> None:
    chances = [Chances(0.8, 0.8, 0.97 if uses else 0.8)]
    engine = make_engine(chances, 0.1, 0.4, noise=0.05, outliers=0.1)
    controller = RoundController(MAX_DRAFTS, MAX_WINDOW)
    engine.run(controller, 200)
    used = []
    for _ in range(75):
        engine.run(controller, 20)
        used.append(controller._used.rounds > 0)
    assert np.mean(used) > 0.9 if uses else np.mean(used) < 0.1


def test_requests_that_differ() -> None:
    """One plan for all, at the optimum of their mixture; windows end when their sum says so."""
    chances = [Chances(0.9, 0.9, 0.98), Chances(0.3, 0.35, 0.7), Chances(0.8, 0.8, 0.95)] * 3
    engine = make_engine(chances, 0.1, 0.35, noise=0.05)
    controller = RoundController(MAX_DRAFTS, MAX_WINDOW)
    engine.run(controller, 300)
    rate = engine.run(controller, 700) * FULL
    assert rate >= 0.95 * max(best_rates(chances, 0.1, 0.35))
    found = controller._acceptance(engine.names)
    assert found.slim[1::3].max() < 0.85 < 0.9 < found.slim[0::3].min()
    assert found.at_slim[1::3].max() < 0.55 < 0.75 < found.at_slim[2::3].min()


def test_off_above_the_batch_where_it_stops_paying() -> None:
    """Passes that grow with their rows: the tier pays alone, and nothing does for many."""
    for count, uses in ((1, True), (64, False)):
        engine = SimulatedEngine(
            [Chances(0.8, 0.8, 0.95)] * count,
            lambda requests, drafts: 0.1 * FULL * drafts,
            lambda rows: 0.4 * FULL * max(1, rows / 64),
            lambda rows: FULL * max(1, rows / 64),
            noise=0.05,
        )
        controller = RoundController(4, MAX_WINDOW)
        engine.run(controller, 400)
        assert (controller._used.rounds > 0) == uses
        assert uses or engine.run(controller, 300) * FULL >= 0.97 * 64


def test_never_above_the_largest_batch() -> None:
    engine = make_engine([Chances(0.9, 0.9, 0.99)] * 4, 0.05, 0.2)
    controller = RoundController(MAX_DRAFTS, MAX_WINDOW, max_batch=3)
    engine.run(controller, 500)
    assert controller.snapshot()["steps"]["tiered"] == 0
    engine.requests = engine.requests[:3]
    engine.run(controller, 500)
    assert controller.snapshot()["steps"]["tiered"] > 400
    engine.requests = [*engine.requests, engine.requests[0]]
    assert controller.plan(engine.names).rounds == 0


def test_trials_stay_within_the_budget() -> None:
    """A tier without any use costs what the budget allows, however bad it is."""
    for slim, agreement in ((0.9, 0.3), (3.0, 0.05)):
        chances = [Chances(0.8, 0.8, agreement)]
        engine = make_engine(chances, 0.1, slim, noise=0.05)
        controller = RoundController(MAX_DRAFTS, MAX_WINDOW, budget=0.02)
        engine.run(controller, 100)
        plain, _ = best_rates(chances, 0.1, slim)
        assert engine.run(controller, 3000) * FULL >= 0.97 * plain
        assert controller.snapshot()["steps"]["tiered"] > 10, "it is tried all the same"


def test_credit_is_for_what_may_win() -> None:
    """Soon after its first trial a tier that lost clearly is tried within the budget only, and one
    that may have been unlucky again and again."""

    def tiered_steps(slim: float, agreement: float) -> float:
        found = []
        for seed in range(6):
            engine = make_engine([Chances(0.9, 0.9, agreement)], 0.3, slim, noise=0.05, seed=seed)
            controller = RoundController(6, MAX_WINDOW)
            engine.run(controller, 60)
            before = controller.snapshot()["steps"]["tiered"]
            engine.run(controller, 200)
            found.append(controller.snapshot()["steps"]["tiered"] - before)
        return float(np.mean(found))

    assert tiered_steps(0.7, 0.79) < 18, "it brings two thirds of plain drafts"
    assert tiered_steps(0.5, 0.9) > 24, "it brings four fifths"
    assert tiered_steps(0.4, 0.97) > 100, "it wins by 8 %"


def test_a_drafter_that_finds_nothing() -> None:
    engine = make_engine([Chances(0.5, 0.5, 0.9, obtained=0.0)] * 2, 0.1, 0.4, noise=0.05)
    controller = RoundController(MAX_DRAFTS, MAX_WINDOW)
    engine.run(controller, 1000)
    assert engine.run(controller, 500) * FULL >= 0.97 * 2, "plain decoding of two brings 2"
    assert controller.snapshot()["acceptance"][LOSSLESS]["obtained"] < 0.1
    half = make_engine([Chances(0.8, 0.8, 0.5, obtained=0.5)], 0.0, 0.9, noise=0.05)
    controller = RoundController(MAX_DRAFTS, MAX_WINDOW)
    half.run(controller, 500)
    assert controller.snapshot()["acceptance"][LOSSLESS]["obtained"] == pytest.approx(0.5, abs=0.1)
    assert half.run(controller, 1000) * FULL >= 0.96 * max(best_rates(half.requests, 0.0, 0.9))


def test_drafts_that_come_in_runs() -> None:
    """Taken for drafts that come alike in every round, they would leave the tier unused."""
    chances = [Chances(0.7, 0.7, 0.97, 0.25, 0.85)]
    plain, tiered = best_rates(chances, 0.0, 0.25)
    alike = best_rates([Chances(0.7, 0.7, 0.97, 0.25)], 0.0, 0.25)[1]
    assert tiered > 1.15 * alike
    engine = make_engine(chances, 0.0, 0.25, noise=0.05)
    controller = RoundController(MAX_DRAFTS, MAX_WINDOW)
    engine.run(controller, 400)
    assert engine.run(controller, 1500) * FULL >= 0.96 * max(plain, tiered)
    found = controller.snapshot()["acceptance"][LOSSLESS]
    assert found["obtained"] == pytest.approx(0.25, abs=0.06)
    assert found["again"] == pytest.approx(0.85, abs=0.06)


def test_the_same_calls_give_the_same_plans() -> None:
    def plans() -> list[Plan]:
        engine = make_engine(MIXED, 0.1, 0.4, noise=0.1, outliers=0.02)
        controller = RoundController(MAX_DRAFTS, MAX_WINDOW)
        found = []
        for _ in range(400):
            found.append(controller.plan(engine.names))
            engine.step(controller, found[-1])
        return found

    assert plans() == plans()


@pytest.mark.parametrize("max_drafts,max_window", [(0, 16), (3, 0), (1, 1)])
def test_bounds(max_drafts: int, max_window: int) -> None:
    engine = make_engine(MIXED, 0.1, 0.4, max_window=max_window)
    controller = RoundController(max_drafts, max_window)
    for _ in range(200):
        plan = controller.plan(engine.names)
        assert plan.drafts <= max_drafts and plan.rounds <= max_window
        engine.step(controller, plan)


@pytest.mark.parametrize("max_drafts,max_window", [(4, 16), (8, 16), (8, 32), (16, 64), (32, 128)])
def test_plans_take_little_time(
    max_drafts: int, max_window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest arrays of a table, which grow with drafts and squared windows: per step they are
    not much larger than those of the usual window."""
    made = 0

    def counted(accept: Acceptance, times: Times, *args: object) -> object:
        nonlocal made
        made += len(accept.slim) * (len(times.draft) - 1) * (max_window - 1) ** 2
        return tiered_outlook(accept, times, *args)  # type: ignore[arg-type]

    monkeypatch.setattr("vllm_nvium.via_sd.planner.tiered_outlook", counted)
    engine = make_engine([Chances(0.7, 0.8, 0.95)] * 12, 0.05, 0.4, max_window=max_window)
    controller = RoundController(max_drafts, max_window)
    steps = 1500
    engine.run(controller, steps)
    assert 0 < made < 20 * steps / controller.refresh * 8 * 8 * 15**2


@pytest.mark.parametrize("max_window", [16, 32])
@pytest.mark.parametrize("first", [LOSSLESS, PAPER])
def test_the_first_request_does_not_stand_for_all(first: str, max_window: int) -> None:
    """Of 32 requests, whose tier promises the same whatever rule one of them has."""

    def best_tiered(rule: str) -> float:
        controller = RoundController(8, max_window)
        names = [f"{i}" for i in range(32)]
        for i, name in enumerate(names):
            controller.add(name, rule if i == 0 else LOSSLESS)
            for _ in range(4):
                controller.saw_slim_check(name, 4, 4, 3)
                controller.saw_full_check(name, 4, 3, tiered=True)
                controller.saw_full_check(name, 4, 2, tiered=False, asked=4)
        controller.saw_full(128, 1.0)
        controller.saw_slim(128, 0.4)
        controller.saw_draft(32, 4, 0.2)
        found = controller.outlook(names)
        assert found is not None
        return float(found.rates[1:, 1:].max())

    assert best_tiered(first) == pytest.approx(best_tiered(LOSSLESS), rel=0.15)


def test_plans_without_observations() -> None:
    """A runner that reports nothing, and steps without a request, are no reason to fail."""
    controller = RoundController(MAX_DRAFTS, MAX_WINDOW)
    for step in range(300):
        plan = controller.plan([] if step % 3 == 0 else ["a", "b"])
        assert plan.drafts <= MAX_DRAFTS
        if plan.rounds:
            controller.another_round([1, 2], 1, ["a", "b"])
    assert not controller.another_round([], 0, [])
    json.dumps(controller.snapshot())


def test_requests_are_forgotten_when_they_end() -> None:
    engine = make_engine(MIXED, 0.1, 0.4)
    controller = RoundController(MAX_DRAFTS, MAX_WINDOW)
    engine.run(controller, 100)
    assert set(controller._requests) == set(engine.names)
    snapshot = controller.snapshot()
    json.dumps(snapshot)
    for name in engine.names:
        controller.remove(name)
    controller.remove("never seen")
    assert not controller._requests and not controller._gains
    assert controller.snapshot()["acceptance"] == snapshot["acceptance"]


@pytest.mark.parametrize("rule", [LOSSLESS, PAPER])
def test_no_tier_for_requests_that_refuse_it(rule: str) -> None:
    """Batches of them are decoded plainly; where few of them are left, they wait for it."""
    controller = RoundController(MAX_DRAFTS, MAX_WINDOW)
    engine = make_engine([Chances(0.8, 0.8, 0.99)] * 4, 0.05, 0.2, paper=rule == PAPER)
    for name in engine.names:
        controller.add(name, OFF)
    engine.run(controller, 100)
    assert controller.snapshot()["steps"]["tiered"] == 0
    for name in engine.names[1:]:
        controller.remove(name)
        controller.add(name, rule)
    engine.requests = [replace(engine.requests[0], off=True), *engine.requests[1:]]
    engine.run(controller, 200)
    assert controller.snapshot()["steps"]["tiered"] > 100


@pytest.mark.parametrize("rule", [LOSSLESS, PAPER])
@pytest.mark.parametrize("off,seeded", [(7, 0), (31, 0), (3, 3), (0, 7), (0, 31)])
def test_one_request_with_the_tier_does_not_slow_others_down(
    off: int, seeded: int, rule: str
) -> None:
    """Alone it would have windows all the time; beside others, who would wait for them, it pays at
    most in few steps. Trials included, they get what the best plain plan for all of them brings."""
    chances = [Chances(0.9, 0.9, 0.98)]
    chances += [replace(chances[0], off=True)] * off
    draft = 0.05
    engine = make_engine(chances, draft, 0.3, paper=rule == PAPER, seeded=seeded)
    controller = RoundController(MAX_DRAFTS, MAX_WINDOW)
    engine.run(controller, 400)
    rate = engine.run(controller, 1000) * FULL
    plain = plain_outlook(
        acceptance(chances),
        relative_times(MAX_DRAFTS, draft, 0.3),
        Beside.of(None, MAX_DRAFTS, seeded),
    )
    assert rate > 0.97 * plain.rates.max()


def test_a_drafter_that_answers_once_has_one_round() -> None:
    engine = make_engine(MIXED, 0.05, 0.3)
    controller = RoundController(MAX_DRAFTS, MAX_WINDOW, max_rounds=1)
    for _ in range(200):
        plan = controller.plan(engine.names)
        assert plan.rounds <= 1
        engine.step(controller, plan)
    assert controller.snapshot()["steps"]["tiered"] > 0


def test_each_request_by_its_own_rule() -> None:
    """Tokens that the paper's rule keeps say nothing about what the full model would accept."""
    controller = RoundController(4, 8)
    controller.add("lossless", LOSSLESS)
    controller.add("paper", PAPER)
    for _ in range(50):
        controller.saw_slim_check("lossless", 4, 4, 2)
        controller.saw_full_check("lossless", 3, 1, tiered=True)
        controller.saw_slim_check("paper", 4, 4, 4)
        controller.saw_full_check("paper", 4, 4, tiered=True)
    found = controller._acceptance(["lossless", "paper"])
    assert found.own.tolist() == [1, 0]
    assert found.slim == pytest.approx([0.5, 1], abs=0.05)
    assert found.at_slim == pytest.approx([2 / 3, 1], abs=0.05)
