# SPDX-License-Identifier: Apache-2.0
"""What each idea of the planner of VIA-SD is worth: simulated batches run with the planner as it
is and with one idea of it left out, with the same draws.

    python benchmarks/via_sd_planner.py --seeds 8

Prints, by scenario, the share of the best fixed plan that the planner reaches, and for each idea by
how many per cent the tokens per second change when it is left out. An idea that no scenario needs
does not earn its place.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from random import Random
from typing import Any
from unittest.mock import patch

import numpy as np
from simulated_engine import RequestRates, SimulatedEngine
from tqdm import tqdm

from vllm_nvium.via_sd.planner import choose, estimate, estimators
from vllm_nvium.via_sd.planner.choose import Planner
from vllm_nvium.via_sd.planner.estimators import PassTimeEstimator
from vllm_nvium.via_sd.planner.fixed import FixedRounds
from vllm_nvium.via_sd.planner.model import AcceptanceRates, DraftPlan

FULL = 0.02  # seconds of a full pass of one row
MAX_DRAFTS, MAX_WINDOW = 8, 16
# Every planner begins with nothing known; what it learns in is counted apart.
LEARNING, STEPS = 200, 1000


# --- Scenarios ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenario:
    """A batch, what its passes cost, and what changes while it runs.

    Attributes:
        accept, agree, hits, later_hits: mean rates of the requests, as in `RequestRates`.
        draft, slim: cost of a draft token and of a slim pass, in full passes.
        row: what each further row adds to a pass, as a share of its first row's cost.
        spread: standard deviation of the requests' rates, in log-odds.
        life: steps after which a request gives its place to another one; 0: never.
        sure: concentration of the tokens' own survivals about `agree`, 0 where all are alike.
        slow: share of the time in which the machine is twice as slow.
        turn: the step at which the slim tier and the drafter change to `agree_after` and
            `accept_after`.
        paper: the paper's rule instead of the lossless one.
    """

    accept: float
    agree: float
    draft: float
    slim: float
    hits: float = 1.0
    later_hits: float | None = None
    batch: int = 1
    row: float = 0.0
    spread: float = 0.0
    life: int = 0
    sure: float = 0.0
    noise: float = 0.05
    outliers: float = 0.01
    slow: float = 0.0
    turn: int = 0
    agree_after: float = 0.0
    accept_after: float = 0.0
    paper: bool = False


SCENARIOS = {
    "tier pays, draft model": Scenario(0.8, 0.96, 0.15, 0.4),
    "tier pays, no drafts": Scenario(0.5, 0.95, 0.0, 0.4, hits=0.0, sure=2.0),
    "tier pays, n-grams": Scenario(0.7, 0.95, 0.0, 0.45, hits=0.25, later_hits=0.7, sure=2.0),
    "tier does not pay": Scenario(0.8, 0.8, 0.1, 0.7),
    "n-grams, tier does not pay": Scenario(0.6, 0.85, 0.0, 0.75, hits=0.3, later_hits=0.3),
    "nothing pays": Scenario(0.05, 0.5, 0.3, 0.9),
    "about equal": Scenario(0.8, 0.93, 0.08, 0.5),
    "requests differ": Scenario(0.75, 0.93, 0.08, 0.4, batch=8, row=0.03, spread=1.2, life=60),
    "one request after another": Scenario(0.75, 0.93, 0.08, 0.45, spread=1.2, life=60, sure=2.0),
    "rows cost": Scenario(0.8, 0.96, 0.05, 0.4, batch=4, row=0.5, sure=2.0),
    "machine has slow moments": Scenario(0.8, 0.94, 0.1, 0.45, slow=0.3),
    "slow passes": Scenario(0.8, 0.95, 0.1, 0.42, noise=0.15, outliers=0.1),
    "tier becomes good": Scenario(0.8, 0.7, 0.1, 0.35, turn=500, agree_after=0.97),
    "tier becomes bad": Scenario(0.8, 0.97, 0.1, 0.35, turn=500, agree_after=0.6),
    "drafter becomes good": Scenario(0.05, 0.6, 0.1, 0.6, turn=500, accept_after=0.9),
    "paper's rule": Scenario(0.75, 0.95, 0.1, 0.4, paper=True, spread=0.8, life=60, batch=4),
}


class Batch(SimulatedEngine):
    """One whose requests end and whose tokens are not all alike."""

    births: list[int]
    sure = 0.0

    @property
    def names(self) -> list[str]:
        return [f"request {i}, {birth}" for i, birth in enumerate(self.births)]


def spread(rate: float, by: float, random: Random) -> float:
    """With a normal error in its log-odds."""
    if not 0 < rate < 1 or by == 0:
        return rate
    return float(1 / (1 + (1 - rate) / rate * np.exp(-by * random.gauss(0, 1))))


def new_request(scenario: Scenario, random: Random) -> RequestRates:
    accept = spread(scenario.accept, scenario.spread, random)
    agree = spread(scenario.agree, scenario.spread, random)
    return RequestRates(accept, accept, agree, scenario.hits, scenario.later_hits)


def run(scenario: Scenario, planner: Planner | FixedRounds, seed: int) -> tuple[float, float]:
    """Tokens per second in full passes, while the planner learns and afterwards."""
    random = Random(seed)
    speed = [1.0]

    def cost(first: float, rows: int) -> float:
        return FULL * first * speed[0] * (1 + scenario.row * (rows - 1))

    engine = Batch(
        [new_request(scenario, random) for _ in range(scenario.batch)],
        lambda requests, drafts: cost(scenario.draft * drafts, requests),
        partial(cost, scenario.slim),
        partial(cost, 1.0),
        MAX_WINDOW,
        paper=scenario.paper,
        noise=scenario.noise,
        outliers=scenario.outliers,
        confidence=scenario.sure,
        seed=seed,
    )
    engine.births = [0] * scenario.batch
    rates = []
    for steps in (LEARNING, STEPS):
        before = engine.tokens, engine.seconds
        for step in range(0, steps, 10):
            if scenario.slow:
                speed[0] = 2.0 if random.random() < scenario.slow else 1.0
            if scenario.turn and steps == STEPS and step == scenario.turn:
                changes = {"agree": scenario.agree_after, "accept": scenario.accept_after}
                scenario = replace(scenario, **{k: v for k, v in changes.items() if v})
                engine.requests = [new_request(scenario, random) for _ in engine.requests]
            for i in range(scenario.batch):
                if scenario.life and random.random() < 10 / scenario.life:
                    planner.remove(engine.names[i])
                    engine.births[i] += 1
                    requests = list(engine.requests)
                    requests[i] = new_request(scenario, random)
                    engine.requests = requests
            engine.run(planner, 10)
        rates.append((engine.tokens - before[0]) / (engine.seconds - before[1]) * FULL)
    return rates[0], rates[1]


# Plans with all of their rounds, whatever is observed.
FIXED = [
    *(DraftPlan(drafts, 0) for drafts in (0, 1, 2, 3, 4, 6, 8)),
    *(DraftPlan(drafts, rounds) for drafts in (0, 1, 2, 4) for rounds in (1, 2, 3, 4, 6, 10)),
]


# --- Ideas ----------------------------------------------------------------------------------------


def without(*changes: Any) -> Callable[[], AbstractContextManager[Any]]:
    """Leaves an idea out by setting (object, name, value)."""

    @contextmanager
    def patched() -> Iterator[None]:
        with ExitStack() as stack:
            for owner, name, value in changes:
                stack.enter_context(patch.object(owner, name, value))
            yield

    return patched


def _every_round(self: Planner, _: Any, rounds_done: int, request_ids: Any, *__: Any) -> bool:
    return bool(request_ids) and rounds_done < min(self._plan.rounds, self.max_rounds)


_round_of = Planner.another_round
IDEAS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "nothing": nullcontext,
    "windows end by how sure the slim verifier was": without(
        (Planner, "another_round", lambda self, a, b, c, *_: _round_of(self, a, b, c))
    ),
    "windows end where a round does not pay": without((Planner, "another_round", _every_round)),
    "rates of each request": without((estimate, "COMMON_TRIALS", 1e12)),
    "transfer between a request's two rates": without((estimate, "PAIRED", {})),
    "one model's judgement is evidence for the other's": without(
        (estimate, "EVIDENCE", dict.fromkeys(estimate.EVIDENCE, estimate.BY_HITS))
    ),
    "windows teach about plain drafts": without((estimate, "judge_drafts", lambda *_: (0, 0))),
    "hit rate of later rounds": without((AcceptanceRates, "in_later_rounds", lambda self: self)),
    "median of pass times": without(
        (
            PassTimeEstimator.__init__,
            "__defaults__",
            (*PassTimeEstimator.__init__.__defaults__[:2], statistics.fmean),
        )
    ),
    "short memory that replaces the long one": without((estimators, "SURPRISE", 1e9)),
    "trials": without((choose, "TRIAL_INTERVAL", dict.fromkeys(choose.TRIAL_INTERVAL, 1 << 40))),
    "trials count for more": without((choose, "TRIAL_FADE", 1.0)),
    "saved budget": without((choose, "MAX_SAVED_STEPS", 1)),
    "margins": without((choose, "PLAN_MARGIN", 1.0), (choose, "KIND_MARGIN", 1.0)),
    "a new plan when the batch changes": without((Planner, "_is_resized", lambda *_: False)),
}


def measure(task: tuple[str, str, int]) -> tuple[float, float]:
    scenario, idea, seed = task
    with IDEAS[idea]():
        return run(SCENARIOS[scenario], Planner(MAX_DRAFTS, MAX_WINDOW), seed)


def measure_fixed(task: tuple[str, int, int]) -> float:
    scenario, plan, seed = task
    fixed = FixedRounds(FIXED[plan].num_draft_tokens, FIXED[plan].rounds)
    return run(SCENARIOS[scenario], fixed, seed)[1]


def error(values: list[float]) -> float:
    """Standard error of the mean."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--ideas", nargs="+", choices=[*IDEAS][1:], default=[*IDEAS][1:])
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=[*SCENARIOS])
    args = parser.parse_args()
    seeds = range(args.seeds)
    tasks = [(s, i, k) for s in args.scenarios for i in ("nothing", *args.ideas) for k in seeds]
    fixed = [(s, p, k) for s in args.scenarios for p in range(len(FIXED)) for k in seeds[:1]]
    with ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")) as pool:
        both = tqdm(total=len(tasks) + len(fixed), disable=None)

        def counted(results: Any) -> Iterator[Any]:
            for result in results:
                both.update()
                yield result

        rates = dict(zip(tasks, counted(pool.map(measure, tasks, chunksize=4)), strict=True))
        best = dict(zip(fixed, counted(pool.map(measure_fixed, fixed, chunksize=4)), strict=True))
        both.close()
    print("| scenario | tokens per full pass | of the best fixed plan | while it learns |")
    print("|---|---|---|---|")
    for scenario in args.scenarios:
        found = [rates[scenario, "nothing", k] for k in seeds]
        plans = [best[scenario, p, seeds[0]] for p in range(len(FIXED))]
        plan = FIXED[int(np.argmax(plans))]
        mean = statistics.fmean(rate for _, rate in found)
        learning = statistics.fmean(rate for rate, _ in found)
        print(
            f"| {scenario} | {mean:.2f} | {mean / max(plans):.3f} ({plan.num_draft_tokens} x "
            f"{plan.rounds}) | {learning / mean:.3f} |"
        )
    print()
    print("| left out | least | most | mean | where it costs more than two standard errors |")
    print("|---|---|---|---|---|")
    for idea in args.ideas:
        changes = {}
        for scenario in args.scenarios:
            pairs = [
                100 * (rates[scenario, idea, k][1] / rates[scenario, "nothing", k][1] - 1)
                for k in seeds
            ]
            changes[scenario] = statistics.fmean(pairs), error(pairs)
        costs = [
            f"{scenario} {mean:+.1f} ± {off:.1f}"
            for scenario, (mean, off) in changes.items()
            if abs(mean) > max(2 * off, 0.2)
        ]
        means = [mean for mean, _ in changes.values()]
        print(
            f"| {idea} | {min(means):+.1f} % | {max(means):+.1f} % | "
            f"{statistics.fmean(means):+.2f} % | {'; '.join(costs)} |"
        )


if __name__ == "__main__":
    main()
