# SPDX-License-Identifier: Apache-2.0
"""VIA-SD against plain decoding and plain speculative decoding: tokens per second of all engines in
one run, taking turns run by run on one machine.

The plain side is searched over its drafters and their number of drafts; what is compared is the
best of it. Greedy by default, so that every engine says the same; with a temperature every request
has a seed, so that they do then, too.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))

from engine_worker import EngineProcess, steps_in_turn
from measured import drafter_config, machine, ratios, read_prompts


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", help="checkpoint of the target (Hugging Face folder)")
    parser.add_argument(
        "--drafter",
        nargs="+",
        default=["ngram"],
        help="ngram, suffix or checkpoints: engines of each",
    )
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines")
    parser.add_argument("--drafts", default="2,4", help="of the plain engines, one for each")
    parser.add_argument("--max-drafts", type=int, default=4, help="of the VIA-SD engines")
    parser.add_argument(
        "--masks", nargs="*", default=[], help="values of --via-sd-mask, an engine each"
    )
    parser.add_argument(
        "--slims", nargs="*", default=["auto"], help="values of --via-sd-slim, an engine each"
    )
    parser.add_argument(
        "--alone", action="store_true", help="and --via-sd with nothing else, an engine each"
    )
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--mode", choices=("lossless", "paper"), default="lossless")
    parser.add_argument("--rounds", default="auto", help="of the VIA-SD engines")
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--batches", default="1")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--longest-prompt", type=int, default=512, help="tokens")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--warm-up", type=int, default=1, help="runs before those, in which `auto` learns"
    )
    parser.add_argument("--chat", action="store_true", help="put prompts into the chat template")
    parser.add_argument("--enforce-eager", action="store_true")
    return parser.parse_args()


def engines(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Name -> what its engine arguments add."""
    rounds = args.rounds if args.rounds == "auto" else int(args.rounds)

    found: dict[str, dict[str, Any]] = {"plain": {}}
    common = {"mode": args.mode, "rounds": rounds, "window": args.window}
    tiers = [{"mask": mask} for mask in args.masks] + [{"slim": kind} for kind in args.slims]
    for drafter in args.drafter:
        name = Path(drafter).name
        for count in map(int, args.drafts.split(",")):
            found[f"{name}, {count} drafts"] = {
                "speculative_config": drafter_config(drafter, count)
            }
        spec = {"speculative_config": drafter_config(drafter, args.max_drafts)}
        for tier in tiers:
            found[f"{name}, VIA-SD {_name(tier)}"] = spec | _via_sd(common | tier)
    if args.alone:
        for tier in tiers:
            found[f"VIA-SD {_name(tier)} alone"] = _via_sd(common | tier)
    return found


def _via_sd(options: dict[str, Any]) -> dict[str, Any]:
    keys = {f"via_sd_{key}": value for key, value in options.items()}
    return {"additional_config": {"via_sd": True} | keys}


def _name(tier: dict[str, str]) -> str:
    return ", ".join(Path(value).name for value in tier.values())


def measure(
    processes: dict[str, EngineProcess], args: argparse.Namespace, texts: list[Any], batch: int
) -> dict[str, list[dict[str, float]]]:
    """Seconds, tokens and steps of the decode steps of every run, after the warm-up."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in processes}
    label = f"batch {batch}"
    for repeat in tqdm(range(args.warm_up + args.repeats), desc=label, disable=None, leave=False):
        prompts = [texts[(repeat * batch + i) % len(texts)] for i in range(batch)]
        for process in processes.values():
            process.begin(
                prompts=prompts,
                new_tokens=args.new_tokens,
                temperature=args.temperature,
                seed=repeat,
            )
        runs = {name: {"seconds": 0.0, "tokens": 0.0, "steps": 0.0} for name in processes}
        order = list(processes.values())
        first = repeat % len(order)
        for process, step in steps_in_turn(order[first:] + order[:first], whole=True):
            if not step["prefill"]:
                runs[process.name]["seconds"] += step["seconds"]
                runs[process.name]["tokens"] += step["tokens"]
                runs[process.name]["steps"] += 1
        if repeat >= args.warm_up:
            for name, run in runs.items():
                found[name].append(run)
    return found


def rate(runs: list[dict[str, float]]) -> list[float]:
    """Tokens per second of the decode steps of every run."""
    return [run["tokens"] / run["seconds"] for run in runs]


def difference(after: dict[str, Any], before: dict[str, Any]) -> dict[str, float]:
    """Counts of one batch size."""
    return {
        name: after["counts"][name] - before["counts"][name]
        for name in after["counts"]
        if not isinstance(after["counts"][name], list)
    }


def rows(
    found: dict[str, list[dict[str, float]]], views: dict[str, dict[str, Any]], batch: int
) -> list[str]:
    plain = rate(found["plain"])
    speculative = [name for name in found if name.endswith(" drafts")]
    best = max(speculative, key=lambda name: statistics.median(rate(found[name])))
    lines = []
    for name, runs in found.items():
        mine = rate(runs)
        passes = sum(run["steps"] for run in runs) / sum(run["tokens"] for run in runs) * batch
        cells = [name + (" (best)" if name == best else ""), str(batch)]
        cells += [f"{statistics.median(mine):.1f}", ratios(mine, plain)]
        cells += [ratios(mine, rate(found[best])), f"{passes:.3f}"]
        if view := views.get(name):
            counts, planner = view["counts"], view["planner"]
            drafted, proposed = counts["slim_drafted"], counts["window_tokens"]
            accept_slim = counts["slim_accepted"] / drafted if drafted else float("nan")
            accept_full = counts["accepted"] / proposed if proposed else float("nan")
            steps = planner.get("steps", {})
            cells += [f"{accept_slim:.2f} / {accept_full:.2f}", _times(planner), str(steps or "")]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _times(planner: dict[str, Any]) -> str:
    """Milliseconds of the smallest pass of each kind that was seen."""
    if not planner:
        return ""
    seconds, cells = planner["seconds"], []
    for kind in ("full", "slim"):
        points = seconds[kind]
        values = points.values() if isinstance(points, dict) else [p[1] for p in points]
        cells.append(f"{kind} {1000 * min(values):.1f}" if values else f"{kind} -")
    draft = seconds["draft"]
    cells.append(f"draft {1000 * draft[1]:.1f}" if len(draft) > 1 else "")
    return ", ".join(cells)


def main() -> None:
    args = parse()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    texts = read_prompts(args.prompts, args.target, args.longest_prompt, args.chat)
    batches = [int(batch) for batch in args.batches.split(",")]
    common = {
        "dtype": args.dtype,
        "max_model_len": args.longest_prompt + args.new_tokens + 64,
        "max_num_seqs": max(batches),
        "enforce_eager": args.enforce_eager,
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
        "async_scheduling": False,
    }
    processes: dict[str, EngineProcess] = {}
    mode = "--enforce-eager" if args.enforce_eager else "default compilation"
    about = [
        f"machine: {machine()}",
        f"target {Path(args.target).name}, {args.dtype}, {mode}, "
        f"prompts {args.prompts.name}, {args.new_tokens} new tokens, temperature "
        f"{args.temperature:g}, {args.repeats} runs "
        f"after {args.warm_up}, "
        f"runs in turn, medians, decode steps only; VIA-SD: {args.mode}, rounds "
        f"{args.rounds}, at most {args.max_drafts} drafts, window {args.window}",
        "",
        "| engine | batch | tok/s | / plain decoding | / best plain speculative | full passes per "
        "token | accepted at slim / of window at full | ms per pass | steps |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    try:
        for name, more in engines(args).items():
            processes[name] = EngineProcess(name, args.target, common | more)
        print(*about, sep="\n", flush=True)
        for batch in batches:
            before = {name: process.via_sd() for name, process in processes.items()}
            found = measure(processes, args, texts, batch)
            views = {}
            for name, process in processes.items():
                if view := process.via_sd():
                    view["counts"] = difference(view, before[name])
                    views[name] = view
            print(*rows(found, views, batch), sep="\n", flush=True)
    finally:
        for process in processes.values():
            process.close()
    print(json.dumps(views, indent=1))


if __name__ == "__main__":
    main()
