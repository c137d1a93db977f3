# SPDX-License-Identifier: Apache-2.0
"""Speed of one model with two states of this code, taking turns on one machine: the measure of a
change that shall make steps cheaper, or must not make them dearer.

    git worktree add ../before HEAD~1
    python benchmarks/two_checkouts.py ../before . --model NVIUM_CHECKPOINT
    python benchmarks/two_checkouts.py ../before . --model TARGET --prompts humaneval.jsonl \\
        --temperature 0 --whole-runs --engine-args '{"additional_config": {"via_sd": true}}'
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from measured import machine, rates, ratios
from nvium_vs_dense import Bench, longest_context


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path, help="checkout that the other is compared with")
    parser.add_argument("new", type=Path, help="checkout that is compared")
    parser.add_argument("--model", required=True, help="an N-vium checkpoint, or VIA-SD's target")
    parser.add_argument("--engine-args", type=json.loads, default={}, help="more of vllm.LLM's")
    parser.add_argument(
        "--old-engine-args",
        type=json.loads,
        help="those of the old side, where options have another name there",
    )
    parser.add_argument("--prompts", type=Path, help="JSON lines with question, prompt or turns")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--prompt-lengths", default="32,128,512", help="requests take turns")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--warm-up", type=int, default=1, help="runs before those, in which `auto` learns"
    )
    parser.add_argument(
        "--whole-runs",
        action="store_true",
        help="take turns run by run instead of step by step, for engines that plan by the time "
        "between their steps: VIA-SD with rounds `auto`",
    )
    parser.add_argument("--processes", type=int, default=1, help="engines of each side, averaged")
    parser.add_argument("--enforce-eager", action="store_true")
    return parser.parse_args()


def state_of(checkout: Path) -> str:
    """Its commit, and whether files differ from it."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=10"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or str(checkout)


def main() -> None:
    args = parse()
    for side in (args.old, args.new):
        if not (side / "vllm_nvium" / "__init__.py").is_file():
            raise SystemExit(f"{str(side)!r} is no checkout of this package.")
    args.dense = args.model  # whose tokenizer reads --prompts
    more = {"new": args.engine_args, "old": args.engine_args}
    if args.old_engine_args is not None:
        more["old"] = args.old_engine_args
    batches = [int(batch) for batch in args.batches.split(",")]
    engine_args = {
        "dtype": "bfloat16",
        "max_model_len": longest_context(args.dense),
        "max_num_seqs": max(batches),
        "max_num_batched_tokens": max(1024, 512 * max(batches)),
        "enforce_eager": args.enforce_eager,
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
    }
    bench = Bench(args, engine_args)
    bench.whole_runs, bench.warm_up = args.whole_runs, args.warm_up
    bench.depths = [1.0] * 64  # how deep steps go does not count here
    try:
        for name, checkout in (("old", args.old), ("new", args.new)):
            bench.start(name, args.model, checkout, **more[name])
        lines = [row(bench, batch) for batch in batches]
    finally:
        bench.close()
    mode = "--enforce-eager" if args.enforce_eager else "default compilation"
    print(f"machine: {machine()}")
    print(f"old {state_of(args.old)}, new {state_of(args.new)}; {Path(args.model).name}, {mode}")
    for name, found in more.items():
        print(f"{name}: {json.dumps(found)}")
    turns = "runs" if args.whole_runs else "steps"
    print(
        f"T={args.temperature:g}, {args.new_tokens} new tokens, {args.repeats} runs after "
        f"{args.warm_up}, {args.processes} engines of each side, {turns} in turn, medians; prefill "
        "included\n"
    )
    print("| batch | old tok/s | new tok/s | new / old |", "|---|---|---|---|", *lines, sep="\n")


def row(bench: Bench, batch: int) -> str:
    temperature = bench.args.temperature
    found = bench.compare({"old": temperature, "new": temperature}, batch)
    old, new = rates(found["old"]), rates(found["new"])
    return (
        f"| {batch} | {statistics.median(old):.1f} | {statistics.median(new):.1f} | "
        f"{ratios(new, old)} |"
    )


if __name__ == "__main__":
    main()
