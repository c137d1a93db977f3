# SPDX-License-Identifier: Apache-2.0
"""Speed-ups of the model pairs of the VIA-SD paper, computed from the rejection rates that it
reports and from the bytes of weights that each pass reads, beside the speed-ups that it reports.
Nothing is measured on a model; the planner runs on a simulated engine.

    python benchmarks/via_sd_modelled.py
"""

import argparse
from dataclasses import dataclass

import numpy as np
from simulated_engine import RequestRates, SimulatedEngine

from vllm_nvium.via_sd.planner.choose import Planner
from vllm_nvium.via_sd.planner.model import (
    AcceptanceRates,
    PassTimeCurve,
    StepTimes,
    forecast_plain,
    forecast_tiered,
)

BYTES = 2  # bfloat16
# Parameters in units of 1e9: all of them, and the embeddings, which are tied: the head reads them.
GEMMA = {"2B": (2.61, 0.59), "9B": (9.24, 0.92), "27B": (27.23, 1.18)}
# The paper has no window: rounds go on until a token escalates.
LONG_WINDOW = 64


@dataclass(frozen=True)
class Reported:
    """One cell of the paper's table (arXiv:2606.12243).

    Attributes:
        rejected, via_rejected: rejection rates of speculative decoding and of VIA-SD.
        speed, via_speed: over plain decoding.
    """

    target: str
    data: str
    rejected: float | None
    speed: float
    via_rejected: float | None
    via_speed: float


REPORTED = [
    Reported("9B", "WebQ", 0.17, 1.50, 0.10, 1.82),
    Reported("9B", "NatQA", 0.27, 1.32, 0.17, 2.10),
    Reported("9B", "TriviaQA", 0.21, 1.55, 0.13, 2.33),
    Reported("27B", "WebQ", None, 1.55, None, 2.32),
    Reported("27B", "NatQA", None, 1.54, None, 2.61),
    Reported("27B", "TriviaQA", None, 1.65, None, 2.50),
]

ASSUMPTIONS = """Assumptions
- A pass takes the bytes of its weights over the bandwidth: {bandwidth:g} TB/s, of which
  {efficiency:.0%} is reached, plus {fixed:g} ms; rows cost nothing. The slim verifier skips
  {skip:.0%} of the layers and keeps the head.
- The rejection rate of speculative decoding is the chance per draft that the target rejects it.
  Deduced: with {gamma} drafts it gives the second column of speed-ups; as the share of all drafts
  that are thrown away it would give {other}.
- The rejection rate of VIA-SD is taken as the chance per draft that the slim verifier does not keep
  it. That cannot be deduced: the report does not say by whom, nor how many tokens escalate. So
  every model is given for several shares of escalated tokens, and the last column says which share
  would give the reported speed-up; "none" where even a target that is never asked is too slow.
- Under the paper's rule the full model replaces every token that escalates, and a block that the
  slim verifier keeps whole adds no token of its own: that is what the model runner does.
- No rejection rates are known to us for 27B. The first is chosen so that the modelled speed-up of
  speculative decoding is the reported one (marked *), the second is lower by as much as for 9B on
  the same data.
- Acceptance is independent per token. The lossless columns take the full model to accept the share
  of slim tokens that does not escalate under the paper's rule; nothing reported says so.
"""


@dataclass(frozen=True)
class Passes:
    """Seconds of one pass of each model."""

    draft: float
    slim: float
    full: float

    def times(self, drafts: int) -> StepTimes:
        draft = np.arange(drafts + 1) * self.draft
        return StepTimes(
            draft, PassTimeCurve([1.0], [self.slim]), PassTimeCurve([1.0], [self.full])
        )


def passes(target: str, args: argparse.Namespace) -> Passes:
    """From weight bytes over bandwidth."""

    def seconds(parameters: float) -> float:
        rate = args.bandwidth * 1e12 * args.efficiency
        return parameters * 1e9 * BYTES / rate + args.fixed / 1e3

    full, embeddings = GEMMA[target]
    slim = embeddings + (full - embeddings) * (1 - args.skip)
    return Passes(seconds(GEMMA["2B"][0]), seconds(slim), seconds(full))


def acceptance(accept_full: float, accept_slim: float, kept_rate: float) -> AcceptanceRates:
    """Under the paper's rule; the full model replaces every token that escalates."""
    rates = {
        "accept_full": accept_full,
        "accept_slim": accept_slim,
        "accept_window": kept_rate,
        "kept_rate": kept_rate,
        "hit_rate": 1.0,
        "hit_rate_later": 1.0,
        "adds_bonus_token": 0.0,
    }
    return AcceptanceRates(**{name: np.array([rate]) for name, rate in rates.items()})


def plain_speed(accept: float, times: StepTimes) -> float:
    """Speed-up over plain decoding with the largest number of drafts."""
    rates = forecast_plain(acceptance(accept, accept, 1.0), times).rates
    return float(rates[-1] / rates[0])


def via_speed(accept_slim: float, escalated: float, times: StepTimes) -> float:
    """Speed-up over plain decoding under the paper's rule: no full pass until a token escalates."""
    accept = acceptance(0.0, accept_slim, 1 - escalated)
    found = forecast_tiered(accept, times, LONG_WINDOW, LONG_WINDOW)
    return float(found.rates[-1].max()) * float(times.full(1))


def accept_for(speed: float, times: StepTimes) -> float:
    """The acceptance per draft that gives a speed-up of plain speculative decoding."""
    tried = np.linspace(0.0, 0.999, 1000)
    return float(min(tried, key=lambda accept: abs(plain_speed(accept, times) - speed)))


def escalated_for(speed: float, accept_slim: float, times: StepTimes) -> str:
    """The share of escalated tokens that gives a speed-up under the paper's rule."""
    per_round = (1 - accept_slim ** (len(times.draft) - 1)) / (1 - accept_slim)
    if per_round * float(times.full(1)) < speed * (times.draft[-1] + float(times.slim(1))):
        return "none"
    tried = np.linspace(0.0, 1.0, 201)
    found = min(tried, key=lambda share: abs(via_speed(accept_slim, share, times) - speed))
    return f"{found:.2f}"


def planned_speed(
    rates: RequestRates, passes_: Passes, args: argparse.Namespace, window: int, paper: bool
) -> float:
    """Speed-up of the planner over plain decoding. A window of 0 turns the tier off."""
    engine = SimulatedEngine(
        [rates],
        lambda requests, drafts: drafts * passes_.draft,
        lambda rows: passes_.slim,
        lambda rows: passes_.full,
        max_window=window,
        paper=paper,
        noise=0.03,
    )
    planner = Planner(args.gamma, window)
    return engine.run(planner, args.steps) * passes_.full


def row(cell: Reported, args: argparse.Namespace) -> str:
    """One line of the table."""
    found = passes(cell.target, args)
    times = found.times(args.gamma)
    if cell.rejected is None or cell.via_rejected is None:
        smaller = next(each for each in REPORTED if each.data == cell.data and each.rejected)
        assert smaller.rejected and smaller.via_rejected
        accept = accept_for(cell.speed, times)
        accept_slim = 1 - (1 - accept) * smaller.via_rejected / smaller.rejected
    else:
        accept, accept_slim = 1 - cell.rejected, 1 - cell.via_rejected
    mark = "*" if cell.rejected is None else ""

    def planned(window: int, paper: bool) -> list[float]:
        shares = args.escalated if window else [0.0]
        rates = [RequestRates(accept, accept_slim, 1 - share) for share in shares]
        return [planned_speed(each, found, args, window, paper) for each in rates]

    columns = [
        f"2B -> {cell.target}, {cell.data}",
        f"{1 - accept:.2f}{mark} / {1 - accept_slim:.2f}{mark}",
        f"{cell.speed:.2f}",
        f"{plain_speed(accept, times):.2f}{mark}",
        *(_joined(planned(0, False)), f"{cell.via_speed:.2f}"),
        _joined([via_speed(accept_slim, share, times) for share in args.escalated]),
        _joined(planned(args.window, True)),
        _joined(planned(args.window, False)),
        escalated_for(cell.via_speed, accept_slim, times),
    ]
    return "| " + " | ".join(columns) + " |"


def _joined(speeds: list[float]) -> str:
    return " / ".join(f"{speed:.2f}" for speed in speeds)


def other_reading(args: argparse.Namespace) -> str:
    """Speed-ups if rejection rates were shares of all drafts."""
    speeds = []
    for cell in REPORTED:
        if cell.rejected is not None:
            found = passes(cell.target, args)
            tokens = 1 + args.gamma * (1 - cell.rejected)
            speeds.append(tokens * found.full / (args.gamma * found.draft + found.full))
    return _joined(speeds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bandwidth", type=float, default=2.0, help="TB/s (default: an A100's 2)")
    parser.add_argument("--efficiency", type=float, default=0.7, help="share of it (default: 0.7)")
    parser.add_argument("--fixed", type=float, default=0.0, help="ms per pass (default: 0)")
    parser.add_argument("--skip", type=float, default=0.45, help="share of layers (default: 0.45)")
    parser.add_argument("--gamma", type=int, default=5, help="most drafts (default: 5)")
    parser.add_argument("--window", type=int, default=16, help="the planner's (default: 16)")
    parser.add_argument(
        "--escalated",
        type=float,
        nargs="+",
        default=[0.0, 0.05, 0.1],
        help="shares of slim tokens, one number each in a cell (default: 0 0.05 0.1)",
    )
    parser.add_argument("--steps", type=int, default=2000, help="simulated (default: 2000)")
    args = parser.parse_args()
    values = {name: getattr(args, name) for name in ("bandwidth", "efficiency", "fixed", "skip")}
    print(ASSUMPTIONS.format(**values, gamma=args.gamma, other=other_reading(args)))
    for target in ("9B", "27B"):
        found = passes(target, args)
        print(
            f"2B -> {target}: draft {found.draft * 1e3:.2f} ms, slim {found.slim * 1e3:.2f} ms "
            f"({found.slim / found.full:.2f} of full), full {found.full * 1e3:.2f} ms"
        )
    shares = " / ".join(f"{share:g}" for share in args.escalated)
    print("\nModelled speed-ups over plain decoding; several in a cell: escalated", shares, "\n")
    print(
        "| pair, data | rejected, SD / VIA-SD | SD reported | SD modelled | "
        "SD, drafts by the planner | VIA-SD reported | VIA-SD modelled | "
        "planner, paper's rule | planner, lossless | escalated that fits |"
    )
    print("|---" * 10 + "|")
    for cell in REPORTED:
        print(row(cell, args))


if __name__ == "__main__":
    main()
