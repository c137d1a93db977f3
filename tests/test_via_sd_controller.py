# SPDX-License-Identifier: Apache-2.0
"""Drafts and rounds by measured times and acceptances: formulas, estimates, and the controller on a
simulated engine."""

import itertools
import json
from collections.abc import Sequence
from math import prod

import numpy as np
import pytest

from vllm_nvium.spec_decode.controller import (
    HORIZON,
    Acceptance,
    Curve,
    DraftTimes,
    Outlook,
    PassTimes,
    Plan,
    RoundController,
    Share,
    Times,
    draft_tokens,
    plain_outlook,
    round_survival,
    tiered_outlook,
    window_tokens,
)
from vllm_nvium.spec_decode.simulation import Chances, SimulatedEngine

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

    def __init__(self, plan: Plan, max_window: int, paper: bool = False) -> None:
        super().__init__(max(plan.drafts, 1), max_window, paper=paper)
        self.fixed = plan

    def plan(self, request_ids: Sequence[str]) -> Plan:
        return self.fixed

    def another_round(
        self, window_lengths: Sequence[int], rounds_done: int, request_ids: Sequence[str]
    ) -> bool:
        return bool(request_ids) and rounds_done < self.fixed.rounds


def flat(seconds: float) -> Curve:
    return Curve([1.0], [seconds])


def acceptance(chances: Sequence[Chances]) -> Acceptance:
    kinds = ("at_full", "at_slim", "slim", "obtained")
    return Acceptance(*(np.array([getattr(chance, kind) for chance in chances]) for kind in kinds))


def one(at_full: float, slim: float = 0.9, obtained: float = 1.0) -> Acceptance:
    return acceptance([Chances(at_full, at_full, slim, obtained)])


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


def lengths_of_a_round(accept: float, drafts: int, obtained: float) -> dict[int, float]:
    """Chance of each length, by going through all outcomes of all drafts."""
    chances = {1: 1 - obtained}
    for outcome in itertools.product((True, False), repeat=drafts):
        kept = next((i for i, good in enumerate(outcome) if not good), drafts)
        chance = prod(accept if good else 1 - accept for good in outcome)
        chances[kept + 1] = chances.get(kept + 1, 0.0) + obtained * chance
    return chances


@pytest.mark.parametrize("obtained", [1.0, 0.3])
@pytest.mark.parametrize("drafts", [0, 1, 4])
@pytest.mark.parametrize("accept", [0.0, 0.55, 1.0])
def test_tokens_of_a_check_by_enumeration(accept: float, drafts: int, obtained: float) -> None:
    lengths = lengths_of_a_round(accept, drafts, obtained)
    assert sum(lengths.values()) == pytest.approx(1)
    wanted = sum(length * chance for length, chance in lengths.items())
    found = draft_tokens(np.array(accept), np.array(drafts), np.array(obtained))
    assert found == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("slim", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("obtained", [1.0, 0.4])
@pytest.mark.parametrize("drafts,rounds", [(1, 1), (3, 1), (2, 3)])
def test_tokens_of_a_window_by_enumeration(
    drafts: int, rounds: int, obtained: float, slim: float
) -> None:
    lengths = lengths_of_a_round(0.6, drafts, obtained)
    wanted = 0.0
    for window in itertools.product(lengths, repeat=rounds):
        kept = sum(slim**k for k in range(sum(window) + 1))
        wanted += prod(lengths[length] for length in window) * kept
    arguments = np.array(0.6), np.array(slim), np.array(drafts), np.array(obtained)
    found = window_tokens(round_survival(*arguments), np.array(slim), np.array(rounds))
    assert found == pytest.approx(wanted, rel=1e-6)


MIXED = [Chances(0.8, 0.85, 0.95), Chances(0.5, 0.6, 0.8, 0.7), Chances(0.7, 0.9, 0.9)]


@pytest.mark.parametrize("paper", [False, True])
@pytest.mark.parametrize("plan", [Plan(0, 0), Plan(3, 0), Plan(2, 1), Plan(3, 2), Plan(1, 4)])
def test_outlooks_against_a_simulation(plan: Plan, paper: bool) -> None:
    """Tokens, and the seconds of passes that grow with their rows."""
    slim, full = Curve([1.0, 17.0], [0.3, 0.5]), Curve([1.0, 33.0], [1.0, 1.6])
    engine = SimulatedEngine(MIXED, lambda n, d: 0.1 * d, slim.at, full.at, 16, paper)
    steps = 6000
    rate = engine.run(FixedPlan(plan, 16, paper), steps)
    times = Times(np.arange(4) * 0.1, slim, full)
    if plan.rounds:
        outlook = tiered_outlook(acceptance(MIXED), times, 16, paper)
        cell: tuple[int, ...] = (plan.drafts - 1, plan.rounds - 1)
    else:
        outlook, cell = plain_outlook(acceptance(MIXED), times), (plan.drafts,)
    assert engine.tokens / steps == pytest.approx(outlook.tokens[cell], rel=0.02)
    assert rate == pytest.approx(outlook.rates[cell], rel=0.02)


@pytest.mark.parametrize("paper", [False, True])
def test_a_window_that_is_full(paper: bool) -> None:
    """Rounds end at the window's bound, and the mean length stands for the true one."""
    chances = [Chances(0.8, 0.8, 0.97)]
    outlook = tiered_outlook(acceptance(chances), relative_times(4, 0.05, 0.4), 8, paper)
    engine = make_engine(chances, 0.05, 0.4, max_window=8, paper=paper)
    rate = engine.run(FixedPlan(Plan(4, 8), 8, paper), 4000) * FULL
    assert outlook.rates[3].max() == pytest.approx(rate, rel=0.06)
    assert outlook.rates[3, 4] == 0, "after three rounds of 3.4 tokens there is no room"
    assert (outlook.tokens <= sum(0.97**k for k in range(9)) + 1e-9).all()


def test_some_requests_stand_for_all() -> None:
    times = Times(np.arange(4) * 0.1, Curve([1.0, 99.0], [0.3, 1.0]), Curve([1.0, 99.0], [1, 3]))
    eight, two = acceptance([Chances(0.6, 0.7, 0.9)] * 8), acceptance([Chances(0.6, 0.7, 0.9)] * 2)
    two = Acceptance(two.at_full, two.at_slim, two.slim, two.obtained, weight=4)
    for paper in (False, True):
        pairs = [
            (plain_outlook(eight, times), plain_outlook(two, times)),
            (tiered_outlook(eight, times, 8, paper), tiered_outlook(two, times, 8, paper)),
        ]
        for all_, sample in pairs:
            np.testing.assert_allclose(sample.tokens, all_.tokens)
            np.testing.assert_allclose(sample.seconds, all_.seconds)


@pytest.mark.parametrize("name", DRAFTERS)
def test_agrees_with_the_simplest_model_of_tiers(name: str) -> None:
    """The usual formulas take a window's mean length for its length, which is exact for rounds of
    one length and too good by a little for others."""
    accept, cost = DRAFTERS[name]
    plain = plain_outlook(one(accept), relative_times(24, cost, 1.0)).rates
    per = [(1 - accept ** (d + 1)) / (1 - accept) for d in range(25)]
    assert plain == pytest.approx([per[d] / (1 + d * cost) for d in range(25)], rel=1e-6)
    for slim_cost, agreement in itertools.product(SLIM_COSTS, AGREEMENTS):
        times = relative_times(12, cost, slim_cost)
        found = tiered_outlook(one(accept, agreement), times, 200).rates[:, :12]
        sure = tiered_outlook(one(1.0, agreement), times, 200).rates[:, :12]
        for d, rounds in itertools.product(range(1, 13), range(1, 13)):
            seconds = 1 + rounds * (d * cost + slim_cost)
            mean = (1 - agreement ** (per[d] * rounds + 1)) / (1 - agreement) / seconds
            assert 0.92 * mean <= found[d - 1, rounds - 1] <= mean * (1 + 1e-6)
            exact = (1 - agreement ** ((d + 1) * rounds + 1)) / (1 - agreement) / seconds
            assert sure[d - 1, rounds - 1] == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("name", DRAFTERS)
def test_agrees_with_the_simplest_model_of_the_papers_rule(name: str) -> None:
    """It pays one full pass for every token that escalates, and never for two in one round."""
    accept, cost = DRAFTERS[name]
    for slim_cost, escalated in itertools.product(SLIM_COSTS, (0.02, 0.05, 0.1)):
        times = relative_times(6, cost, slim_cost)
        found = tiered_outlook(one(accept, 1 - escalated), times, 400, paper=True).rates.max(1)
        for d in range(1, 7):
            per = (1 - accept ** (d + 1)) / (1 - accept)
            simple = per / (d * cost + slim_cost + min(1, per * escalated))
            assert found[d - 1] == pytest.approx(simple, rel=0.12)


# --- Estimates ------------------------------------------------------------------------------------


def test_what_was_not_tried_does_not_count() -> None:
    """Checks of 4 drafts stop at the first failure; their acceptance per token comes out anyway."""
    share = Share()
    random = np.random.default_rng(0)
    for step in range(3000):
        outcome = random.random(4) < 0.7
        kept = 4 if outcome.all() else int(outcome.argmin())
        share.saw(kept, int(kept < 4), step, 2000)
    assert share.good / share.all == pytest.approx(0.7, abs=0.02)


def test_evidence_fades_but_not_its_share() -> None:
    share = Share()
    for _ in range(50):
        share.saw(8, 2, 10, HORIZON)
    good, all_ = share.aged(10 + 100, 100, 8.0)
    assert (good, all_) == pytest.approx((share.good / 2, share.all / 2))
    good, all_ = share.aged(10**6, 100, 8.0)
    assert all_ == pytest.approx(8) and good == pytest.approx(8 * 0.8)


def test_slow_passes_change_nothing() -> None:
    times = PassTimes()
    random = np.random.default_rng(0)
    for step in range(300):
        rows = int(random.integers(1, 40))
        seconds = (1 + max(rows - 16, 0) / 16) * random.normal(1, 0.05)
        times.saw(rows, seconds * (30 if random.random() < 0.1 else 1), step)
    curve = times.curve()
    assert curve is not None
    assert curve.at(4) == pytest.approx(1, rel=0.05)
    assert curve.at(36) == pytest.approx(1 + 20 / 16, rel=0.15)
    rows = np.arange(0, 64)
    assert (np.diff(curve(rows)) >= 0).all()
    assert [curve.at(row) for row in rows] == pytest.approx(curve(rows).tolist())


def test_one_slow_pass_of_a_size_of_its_own() -> None:
    times = PassTimes()
    for step in range(20):
        times.saw(4, 1.0, step)
    times.saw(9, 50.0, 20)
    curve = times.curve()
    assert curve is not None and curve.at(9) == 1.0


def test_pass_times_follow_what_changes_and_forget_the_rest() -> None:
    times = PassTimes(memory=100)
    for step in range(60):
        times.saw(2, 1.0, step)
        times.saw(9, 2.0, step)
    for step in range(60, 80):
        times.saw(2, 3.0, step)
    curve = times.curve()
    assert curve is not None and curve.at(2) == 2.0, "a larger pass was never seen to take more"
    times.saw(2, 3.0, 200)
    curve = times.curve()
    assert curve is not None and curve.at(2) == curve.at(9) == 3.0


def test_draft_times() -> None:
    times = DraftTimes()
    assert times.seconds(1, 3).tolist() == [0, 0, 0, 0]
    for step in range(5):
        times.saw(1, 2, 0.4, step)
    assert times.seconds(1, 4) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    for step in range(5):
        times.saw(1, 4, 0.5, step)
        times.saw(32, 4, 1.6, step)
    assert times.seconds(1, 5) == pytest.approx([0, 0.2, 0.4, 0.45, 0.5, 0.55])
    assert times.seconds(40, 4)[4] == 1.6


# --- The controller on a simulated engine ---------------------------------------------------------

MAX_DRAFTS, MAX_WINDOW = 8, 16


def best_rates(
    chances: Sequence[Chances], draft: float, slim: float, paper: bool = False
) -> tuple[float, float]:
    """The best plain and the best tiered plan, tokens per full pass."""
    times = relative_times(MAX_DRAFTS, draft, slim)
    plain: Outlook = plain_outlook(acceptance(chances), times)
    tiered = tiered_outlook(acceptance(chances), times, MAX_WINDOW, paper)
    return float(plain.rates.max()), float(tiered.rates.max())


@pytest.mark.parametrize("paper", [False, True])
@pytest.mark.parametrize("name", DRAFTERS)
def test_takes_the_side_that_wins(name: str, paper: bool) -> None:
    accept, draft = DRAFTERS[name]
    for slim, agreement in itertools.product(SLIM_COSTS, AGREEMENTS):
        chances = [Chances(accept, accept, agreement)]
        engine = make_engine(chances, draft, slim, paper=paper, noise=0.05, outliers=0.01)
        controller = RoundController(MAX_DRAFTS, MAX_WINDOW, paper=paper)
        rate = engine.run(controller, 1500) * FULL
        plain, tiered = best_rates(chances, draft, slim, paper)
        where = f"slim {slim} at {agreement}: {rate:.2f} of {plain:.2f} and {tiered:.2f}"
        assert rate >= 0.97 * plain, where
        assert rate >= 0.95 * max(plain, tiered), where
        steps = controller.snapshot()["steps"]
        if tiered > 1.05 * plain:
            assert steps["tiered"] > 0.8 * 1500, where
        if plain > 1.05 * tiered:
            assert steps["tiered"] < 0.2 * 1500, where


def test_follows_what_changes() -> None:
    """A slim tier that gets good, one that gets bad, and a drafter that does."""
    good, bad = Chances(0.8, 0.8, 0.97), Chances(0.8, 0.8, 0.6)
    for before, after, uses in ((bad, good, True), (good, bad, False)):
        engine = make_engine([before], 0.1, 0.35, noise=0.05)
        controller = RoundController(MAX_DRAFTS, MAX_WINDOW)
        engine.run(controller, 1000)
        assert (controller.plan(engine.names).rounds > 0) != uses
        engine.requests = [after]
        engine.run(controller, 1000)
        rate = engine.run(controller, 1000) * FULL
        assert rate >= 0.93 * max(best_rates([after], 0.1, 0.35))
        assert (controller.plan(engine.names).rounds > 0) == uses
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
    assert controller.snapshot()["steps"]["tiered"] - before > 400


@pytest.mark.parametrize("uses", [True, False])
def test_outliers_flip_nothing(uses: bool) -> None:
    chances = [Chances(0.8, 0.8, 0.97 if uses else 0.8)]
    engine = make_engine(chances, 0.1, 0.4, noise=0.05, outliers=0.1)
    controller = RoundController(MAX_DRAFTS, MAX_WINDOW)
    engine.run(controller, 200)
    before = controller.snapshot()["steps"]["tiered"]
    engine.run(controller, 1500)
    tiered = (controller.snapshot()["steps"]["tiered"] - before) / 1500
    assert tiered > 0.9 if uses else tiered < 0.1


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
        assert (controller.plan(engine.names).rounds > 0) == uses
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


def test_a_drafter_that_finds_nothing() -> None:
    engine = make_engine([Chances(0.5, 0.5, 0.9, obtained=0.0)] * 2, 0.1, 0.4, noise=0.05)
    controller = RoundController(MAX_DRAFTS, MAX_WINDOW)
    engine.run(controller, 1000)
    assert engine.run(controller, 500) * FULL >= 0.97 * 2, "plain decoding of two brings 2"
    assert controller.snapshot()["acceptance"]["obtained"] < 0.1
    half = make_engine([Chances(0.8, 0.8, 0.5, obtained=0.5)], 0.0, 0.9, noise=0.05)
    controller = RoundController(MAX_DRAFTS, MAX_WINDOW)
    half.run(controller, 500)
    assert controller.snapshot()["acceptance"]["obtained"] == pytest.approx(0.5, abs=0.1)
    assert half.run(controller, 1000) * FULL >= 0.96 * max(best_rates(half.requests, 0.0, 0.9))


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
