# SPDX-License-Identifier: Apache-2.0
"""VIA-SD plan by plan in one engine: plain decoding, the best plain speculative decoding, the best
use of the slim tier and what the planner chooses take turns, batch by batch, and are held
against the optimum that the pass times and acceptances measured in the same runs allow.

    python benchmarks/via_sd_plans.py TARGET --slim int4 --drafter ngram \\
        --prompts humaneval.jsonl gsm8k.jsonl --batches 1,8 --out results.jsonl

Each case (prompts, batch size, rule) starts with a planner that knows nothing; what its first
batches lose is printed too. Tokens per second are all tokens by all seconds of a plan's runs:
prompts differ by a factor of two, so that a median would be one of them. Ratios have a standard
error over the runs, and are given a second time at the mean pass times of all runs, which takes the
machine's moods out. Results are added to --out as they come, and cases that are there already are
not measured again.

With --pass-times nothing is timed: the engine runs as ever, its passes count for what is given, and
`auto` is judged without noise, also while other work runs.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))

from engine_worker import Worker
from measured import copied, drafter_config, machine, read_prompts
from pass_clock import PassClock, at_mean_times, summed

from vllm_nvium.via_sd.planner.estimate import COMMON_TRIALS
from vllm_nvium.via_sd.planner.estimators import PassTimeEstimator
from vllm_nvium.via_sd.planner.model import DraftPlan

# Results in a file that were written otherwise are measured anew.
FORMAT = 4
# Sides that differ by less are not told apart.
CLEAR = 1.05
# The hit rate of the first drafts of windows, beside the rates of `AcceptanceRates`.
FIRST_HITS = "hit_rate_of_windows"
SPREAD = "± standard error (range run by run)"
PLANS = ("plain", "speculative", "tier", "auto")
KINDS = {
    "plain": "plain decoding",
    "speculative": "best plain speculative",
    "tier": "best with the tier",
    "auto": "VIA-SD `auto`",
}


@dataclass(frozen=True)
class Case:
    """What one table row, or block of rows, is about."""

    prompts: str
    batch: int
    mode: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What both programs that measure plans take."""
    parser.add_argument("--prompts", type=Path, nargs="+", required=True, help="JSON lines")
    parser.add_argument("--drafter", default="ngram", help="ngram, suffix, or a checkpoint")
    parser.add_argument("--modes", default="lossless", help="lossless,paper")
    parser.add_argument("--batches", default="1", help="requests at a time")
    parser.add_argument("--chat", action="store_true", help="use the chat template")
    parser.add_argument("--longest-prompt", type=int, default=256, help="leave longer ones out")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        help="float32: hardly any ties, so all plans' texts are equal",
    )
    parser.add_argument("--max-drafts", type=int, default=6)
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=6, help="batches, each with every plan")
    parser.add_argument(
        "--warm-up", type=int, default=3, help="batches before them, that tell the best plans"
    )
    parser.add_argument("--learn", type=int, default=4, help="first of all, batches of `auto` only")
    parser.add_argument("--out", type=Path, help="JSON lines of results, to go on with")


def pass_times(text: str) -> str:
    """What --pass-times takes, unchanged."""
    values = text.split(":")
    try:
        right = len(values) in (2, 3) and all(float(value) > 0 for value in values)
    except ValueError:
        right = False
    if not right:
        raise argparse.ArgumentTypeError(f"{text!r}: two or three times above 0, as 116:95:41")
    return text


def given_times(args: Any) -> dict[str, float] | None:
    """Seconds of passes that are given instead of measured."""
    if args.pass_times is None:
        return None
    values = [float(value) / 1000 for value in args.pass_times.split(":")]
    return dict(zip(("full", "slim", "draft"), values, strict=False))


# --- Measuring, in a process that has the engine --------------------------------------------------


class Counter(PassClock):
    """A planner that also counts successes and trials of every rate by batch.

    By batch, because prompts differ: forecasts by the rates of all prompts together promise too
    much. And the hit rate of plain drafts and of a window's first drafts are counted apart: n-grams
    come in runs, a window uses up a whole run, and so the next window's first drafts are found less
    often.

    Attributes:
        running: the batch that runs.
        sums: successes and trials by batch, then by rate; under None, of all batches together.
    """

    running = 0

    def __init__(self, max_drafts: int, max_window: int) -> None:
        super().__init__(max_drafts, max_window)
        self.sums: dict[int | None, dict[str, list[float]]] = {}

    def counted(self, batch: int | None, rate: str) -> list[float]:
        """Successes and trials, of one batch or of all."""
        return self.sums.setdefault(batch, {}).setdefault(rate, [0.0, 0.0])

    @property
    def batches(self) -> list[int]:
        return [batch for batch in self.sums if batch is not None]

    def _rounds(self) -> int:
        """Of the present plan."""
        return self._plan.rounds

    def _observe_rate(self, request_id: str, rate: str, successes: float, failures: float) -> None:
        super()._observe_rate(request_id, rate, successes, failures)
        if self._rounds() and rate == "accept_full":
            return  # judged by a window; here only plain drafts count
        rate = FIRST_HITS if rate == "hit_rate" and self._rounds() else rate
        for batch in (self.running, None):
            sums = self.counted(batch, rate)
            sums[0] += successes
            sums[1] += successes + failures


class Recorder(Counter):
    """Always plans `fixed`, and forecasts by everything observed since `forget`.

    Its forecasts are the optimum that `auto` is compared with: here every plan runs on the same
    prompts, while `auto` compares plans that ran on different ones.
    """

    fixed = DraftPlan(0, 0)
    # Which hit rate forecasts use: of the first drafts of windows, or of plain drafts.
    of_windows = False
    # The batch whose rates forecasts use; None: all of them together.
    asked_for: int | None = None

    def __init__(self, max_drafts: int, max_window: int) -> None:
        super().__init__(max_drafts, max_window)
        # Whose rates forecasts use. Pass times are always its own.
        self.source: Counter = self
        self.forget()

    def forget(self) -> None:
        """Drops all times and rates."""
        # Means of all passes: a slow pass counts here as it does in the runs.
        times = partial(PassTimeEstimator, keep=1 << 20, memory=1 << 40, average=statistics.fmean)
        self.reset_times(times)
        self.sums = {}

    def plan(self, request_ids: Any, num_decoding: int = 0, most: Any = None) -> DraftPlan:
        self._step += 1
        return self.fixed

    def another_round(self, _: Any, rounds_done: int, request_ids: Any, *__: Any) -> bool:
        return bool(request_ids) and rounds_done < self.fixed.rounds

    def _rounds(self) -> int:
        return self.fixed.rounds

    def rate_of_rule(self, rule: str, rate: str) -> float:
        name = FIRST_HITS if rate == "hit_rate" and self.of_windows else rate
        successes, trials = self.source.counted(None, name)
        mean = successes / trials if trials else super().rate_of_rule(rule, rate)
        successes, trials = self.source.counted(self.asked_for, name)
        # A batch with few trials is taken for one like the others.
        return (successes + mean * COMMON_TRIALS) / (trials + COMMON_TRIALS)


class Engine:
    """A VIA-SD engine in this process whose plan can be set from outside."""

    def __init__(
        self, model: str, tier: dict[str, str], longest: int, batch: int, args: Any
    ) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        options = tier | {"window": args.window, "allow_paper_mode": True}
        self.args = args
        self.worker = Worker(
            model,
            {
                "dtype": args.dtype,
                "max_model_len": longest + args.new_tokens + 64,
                "max_num_seqs": batch,
                "gpu_memory_utilization": 0.5,  # on CPU what must be free at the start
                "enforce_eager": args.enforce_eager,
                "enable_prefix_caching": False,
                "skip_tokenizer_init": True,
                "async_scheduling": False,
                "speculative_config": drafter_config(args.drafter, args.max_drafts),
                "additional_config": {"via_sd": True}
                | {f"via_sd_{name}": value for name, value in options.items()},
            },
        )
        self.runner = self.worker.engine.collective_rpc(lambda each: [each.model_runner])[0][0]

    def run(
        self, prompts: list[list[int]], mode: str, planner: PassClock, seed: int
    ) -> dict[str, Any]:
        """Tokens, seconds and passes of a batch's decode steps until its first request is done,
        those seconds of them in which windows were made; full passes per token of all steps, and
        how much of the texts stood before."""
        self.runner.session.planner = planner
        planner.taken()
        counts = self.runner.session.counts
        turns, tokens = counts.turns, counts.tokens
        options = {"via_sd_mode": mode}
        self.worker.begin(
            prompts, self.args.new_tokens, temperature=0.0, seed=seed, extra_args=options
        )
        run: dict[str, Any] = dict.fromkeys(("tokens", "seconds", "tiered"), 0.0)
        passes: list[tuple[str, int, float]] = []
        unfinished = is_full = True
        while unfinished:
            step, taken = self.worker.step(), planner.taken()
            unfinished = step["unfinished"]
            if not step["prefill"] and is_full:
                known = sum(seconds for _, _, seconds in taken)
                seconds = step["seconds"] if planner.given is None else known
                passes += [*taken, ("other", 0, seconds - known)]
                run["tokens"] += step["tokens"]
                run["seconds"] += seconds
                run["tiered"] += seconds * (self.runner.session.plan.rounds > 0)
            # The last requests of a batch would be timed in a smaller one.
            is_full = max(self.worker.lengths.values()) < self.args.new_tokens
        run["passes_per_token"] = (counts.turns - turns) / max(counts.tokens - tokens, 1)
        run["passes"] = summed(passes)
        texts = [self.worker.texts[name] for name in sorted(self.worker.texts, key=int)]
        run["copied"] = statistics.fmean(map(copied, prompts, texts))
        return run

    def measure(self, case: Case, prompts: list[list[int]]) -> dict[str, Any]:
        """Runs of every plan in turn, and what the measured times and acceptances allow."""
        args, size = self.args, case.batch
        auto = Counter(args.max_drafts, args.window)
        recorder = Recorder(args.max_drafts, args.window)
        auto.given = recorder.given = given_times(args)

        def run(number: int, name: str) -> dict[str, Any]:
            batch = [prompts[(number * size + i) % len(prompts)] for i in range(size)]
            recorder.fixed = plans.get(name, recorder.fixed)
            recorder.running = auto.running = number
            return self.run(batch, case.mode, recorder if name in plans else auto, number)

        plans = {"plain": DraftPlan(0, 0), "speculative": DraftPlan(4, 0), "tier": DraftPlan(2, 2)}
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ("learning", *PLANS)}
        for number in range(args.learn):
            runs["learning"].append(run(number, "auto"))
        for number in range(args.learn, args.learn + args.warm_up):
            for name in PLANS:
                run(number, name)
        best_plans(recorder, plans, case)
        recorder.forget()
        auto.sums = {}
        before = dict(auto.snapshot()["steps"])
        first = args.learn + args.warm_up
        for number in range(first, first + args.repeats):
            turn = number % len(PLANS)
            for name in PLANS[turn:] + PLANS[:turn]:  # nobody always follows the same plan
                runs[name].append(run(number, name))
        # What is possible by what was seen in these runs, and what the plans of these runs promise.
        promised = best_plans(recorder, dict(plans), case)
        seen = recorder.snapshot()
        hits, requested = recorder.counted(None, FIRST_HITS)
        own = promises(recorder, plans, case)
        # The same of the texts that `auto` wrote, which under the paper's rule are others.
        recorder.source = auto
        at_hand = best_plans(recorder, dict(plans), case)
        recorder.source = recorder
        slim = self.runner.slim
        return {
            "case": asdict(case),
            "copies": "none: the tier is off" if slim is None else slim.kind,
            "runs": runs,
            "plans": {name: plan.cell for name, plan in plans.items()},
            "promised": own,
            "optimum": max(promised.values()),
            "at_hand": at_hand,
            "steps": {k: v - before[k] for k, v in auto.snapshot()["steps"].items()},
            "acceptance": seen["acceptance"][case.mode] | {FIRST_HITS: hits / max(requested, 1)},
            "milliseconds": {
                kind: 1000 * statistics.median(seen["seconds"][kind].values())
                for kind in ("full", "slim")
            }
            | {"draft": 1000 * float(recorder.draft_seconds(size)[1])},
        }


def expected_rates(recorder: Recorder, case: Case) -> Any:
    """Tokens per second by drafts and rounds, of as many tokens of each batch that was seen."""
    names = [f"like the others, {i}" for i in range(case.batch)]
    for name in names:
        recorder.add(name, case.mode)
    seconds_per_token: list[Any] = []
    for batch in recorder.source.batches:
        recorder.asked_for = batch
        recorder.of_windows = True
        windows = recorder.forecast(names)
        recorder.of_windows = False
        plain = recorder.forecast(names)
        assert plain is not None and windows is not None
        rates = windows.rates
        rates[:, 0] = plain.rates[:, 0]
        seconds_per_token.append(1 / np.maximum(rates, 1e-9))
    recorder.asked_for = None
    for name in names:
        recorder.remove(name)
    return 1 / np.mean(seconds_per_token, axis=0)


def best_plans(recorder: Recorder, plans: dict[str, DraftPlan], case: Case) -> dict[str, float]:
    """Sets the best plans with and without the tier; returns the tokens per second that all of them
    promise."""
    rates = expected_rates(recorder, case)
    plain = 1 + int(rates[1:, 0].argmax())
    # Without drafts the slim verifier drafts for itself, but not under the paper's rule.
    least = int(case.mode == "paper")
    drafts, rounds = divmod(int(rates[least:, 1:].argmax()), rates.shape[1] - 1)
    plans["speculative"] = DraftPlan(plain, 0)
    plans["tier"] = DraftPlan(least + drafts, 1 + rounds)
    return promises(recorder, plans, case)


def promises(recorder: Recorder, plans: dict[str, DraftPlan], case: Case) -> dict[str, float]:
    """Tokens per second of plans by what was seen."""
    rates = expected_rates(recorder, case)
    return {name: float(rates[plan.cell]) for name, plan in plans.items()}


def _measure_all(
    model: str,
    tier: dict[str, str],
    prompts: dict[str, list[list[int]]],
    cases: list[Case],
    about: dict[str, Any],
    args: Any,
) -> list[dict[str, Any]]:
    longest = max(len(ids) for texts in prompts.values() for ids in texts)
    engine = Engine(model, tier, longest, max(case.batch for case in cases), args)
    found = []
    for case in tqdm(cases, desc=about["target"], disable=None, leave=False):
        found.append(about | engine.measure(case, prompts[case.prompts]))
        if args.out:
            with args.out.open("a") as file:
                file.write(json.dumps(found[-1]) + "\n")
    return found


def measure(
    model: str,
    tier: dict[str, str],
    prompts: dict[str, list[list[int]]],
    about: dict[str, Any],
    args: Any,
    noted: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """All cases of one target in a process of its own, so that its weights are gone afterwards.

    Args:
        tier: options that make the slim verifier, without `via_sd_`.
        prompts: token ids by the name of their file.
        about: what tells this target's results from others'; of --out those are taken.
        noted: more to keep with the results.
    """
    known = results(args.out, about)
    noted = about | (noted or {})
    cases = cases_of(args, prompts)
    known = [each for each in known if Case(**each["case"]) in cases]
    todo = [case for case in cases if asdict(case) not in [each["case"] for each in known]]
    if not todo:
        return known
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        found = pool.submit(
            _measure_all, model, tier, prompts, todo, about | (noted or {}), args
        ).result()
    return known + found


def cases_of(args: Any, prompts: Iterable[str]) -> list[Case]:
    """What the options ask for, in the order of the table."""
    return [
        Case(name, int(batch), mode)
        for name in prompts
        for batch in args.batches.split(",")
        for mode in args.modes.split(",")
    ]


def results(path: Path | None, about: dict[str, Any]) -> list[dict[str, Any]]:
    """What a file of results holds of one target."""
    if path is None or not path.is_file():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in rows if all(row.get(name) == about[name] for name in about)]


def about_run(args: Any) -> dict[str, Any]:
    """What of the options makes results comparable."""
    mode = "--enforce-eager" if args.enforce_eager else "default compilation"
    names = ("max_drafts", "window", "new_tokens", "repeats", "warm_up", "learn")
    names += ("longest_prompt", "chat", "pass_times", "dtype")
    return {
        "format": FORMAT,
        "machine": machine(),
        "drafter": Path(args.drafter).name,
        "compilation": mode,
        **{name: getattr(args, name) for name in names},
    }


# --- Tables ---------------------------------------------------------------------------------------


def rate(found: dict[str, Any], name: str) -> float:
    """Tokens per second of all runs of a plan."""
    runs = found["runs"][name]
    return float(sum(run["tokens"] for run in runs) / sum(run["seconds"] for run in runs))


def seconds(found: dict[str, Any], name: str, at_means: bool) -> list[float]:
    """Of every run of a plan; at the mean pass times of the case, if asked for."""
    if at_means:
        return at_mean_times({plan: found["runs"][plan] for plan in PLANS})[name]
    return [run["seconds"] for run in found["runs"][name]]


def rate_at_means(found: dict[str, Any], name: str) -> float:
    """Tokens per second of all runs of a plan at the mean pass times of the case."""
    return float(sum(r["tokens"] for r in found["runs"][name]) / sum(seconds(found, name, True)))


def ratio(found: dict[str, Any], name: str, other: str, at_means: bool = False) -> str:
    """Of all runs of two plans, its standard error over the runs by the jackknife, and the range of
    the ratios run by run.

    With r_i the ratio without run i of each: sqrt((n - 1) / n sum_i (r_i - mean)^2)
    """
    a, b = (
        np.array([[run["tokens"] for run in found["runs"][plan]], seconds(found, plan, at_means)])
        for plan in (name, other)
    )
    pairs = (a[0] / a[1]) / (b[0] / b[1])
    (a_all, a_time), (b_all, b_time) = a.sum(1), b.sum(1)
    without = a.sum(1, keepdims=True) - a, b.sum(1, keepdims=True) - b
    each = (without[0][0] / without[0][1]) / (without[1][0] / without[1][1])
    error = np.sqrt((len(each) - 1) * each.var())
    whole = (a_all / a_time) / (b_all / b_time)
    return f"{whole:.3f} ± {error:.3f} ({pairs.min():.3f}-{pairs.max():.3f})"


def best_without_tier(found: dict[str, Any]) -> str:
    """Plain decoding or plain speculative decoding, whichever is faster."""
    return max(("plain", "speculative"), key=lambda name: rate(found, name))


def learning(found: dict[str, Any]) -> str:
    """What `auto` did in its first batches, as a share of what it does later; prompts differ."""
    if not found["runs"]["learning"]:
        return "not measured"
    return f"{rate(found, 'learning') / rate(found, 'auto'):.3f}"


def at_hand(found: dict[str, Any]) -> float:
    """`auto` as a share of what the best plan promises on the texts that `auto` wrote."""
    return float(rate(found, "auto") / max(found["at_hand"].values()))


def side(found: dict[str, Any]) -> str:
    """Whether `auto` spends its time where more tokens per second are: by the runs of the best
    plans, and under the paper's rule, where each plan writes a text of its own, by what the plans
    promise on the texts of `auto`."""
    if found["case"]["mode"] == "paper":
        promised = found["at_hand"]
        gain = promised["tier"] / max(promised["plain"], promised["speculative"])
    else:
        gain = rate(found, "tier") / rate(found, best_without_tier(found))
    if 1 / CLEAR < gain < CLEAR:
        return "either"
    return "right" if (tier_share(found) > 0.5) == (gain > 1) else "WRONG"


def copied_share(found: dict[str, Any], name: str) -> float:
    """Of the 4-grams of a plan's texts, those that stood before: n-gram drafts live on them."""
    return statistics.fmean(run["copied"] for run in found["runs"][name])


def tier_share(found: dict[str, Any]) -> float:
    """Of the seconds of `auto`, those of steps with windows."""
    runs = found["runs"]["auto"]
    return float(sum(run["tiered"] for run in runs) / sum(run["seconds"] for run in runs))


HEADER = (
    "| prompts, batch, rule | plan | drafts x rounds | tok/s | / plain decoding | / best without "
    "tier | at mean pass times | full passes per token | refused at full | ms per pass |",
    "|" + "---|" * 10,
)


def block(found: dict[str, Any]) -> Iterator[str]:
    """The rows of one case."""
    case, best = found["case"], best_without_tier(found)
    chances, times = found["acceptance"], found["milliseconds"]
    for name in PLANS:
        plan = found["plans"].get(name)
        passes = statistics.mean(run["passes_per_token"] for run in found["runs"][name])
        refused = {"speculative": chances["accept_full"], "tier": chances["accept_window"]}.get(
            name
        )
        cells = [f"{case['prompts']}, {case['batch']}, {case['mode']}" if name == "plain" else ""]
        cells += [KINDS[name], f"{plan[0]} x {plan[1]}" if plan else f"steps {found['steps']}"]
        cells += [f"{rate(found, name):.1f}"]
        cells += [ratio(found, name, other) for other in ("plain", best)]
        cells += [ratio(found, name, best, at_means=True)]
        cells += [f"{passes:.3f}", f"{1 - refused:.2f}" if refused else ""]
        cells += [
            {
                "plain": f"full {times['full']:.1f}",
                "speculative": f"draft {times['draft']:.1f}",
                "tier": f"slim {times['slim']:.1f}, refuses {1 - chances['accept_slim']:.2f}",
                "auto": f"{rate(found, name) / found['optimum']:.3f} of the optimum "
                f"{found['optimum']:.1f}, at mean pass times "
                f"{rate_at_means(found, name) / found['optimum']:.3f}, of that of its own texts "
                f"{at_hand(found):.3f}; side: {side(found)}; first "
                f"batches {learning(found)} of the later ones",
            }[name]
        ]
        yield "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", type=Path, help="checkpoint (Hugging Face folder)")
    parser.add_argument("--mask", help="--via-sd-mask")
    parser.add_argument("--slim", help="--via-sd-slim (default: int4, or skip beside --mask)")
    add_arguments(parser)
    parser.add_argument(
        "--pass-times", type=pass_times, metavar="FULL:SLIM[:DRAFT]", help="milliseconds, given"
    )
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    prompts = {
        path.name: read_prompts(path, str(args.target), args.longest_prompt, args.chat)
        for path in args.prompts
    }
    tier = {"mask": args.mask, "slim": args.slim or (None if args.mask else "int4")}
    tier = {name: value for name, value in tier.items() if value is not None}
    about = {"target": args.target.name} | tier | about_run(args)
    found = measure(str(args.target), tier, prompts, about, args)
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    # Results of older versions do not say it.
    print("slim verifier:", ", ".join(sorted({each.get("copies", "not noted") for each in found})))
    print(
        f"greedy, {args.dtype}, decode steps only, runs in turn, ratios of all of them {SPREAD}", ""
    )
    print(*HEADER, sep="\n")
    for each in found:
        print(*block(each), sep="\n")


if __name__ == "__main__":
    main()
