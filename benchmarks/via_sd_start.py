# SPDX-License-Identifier: Apache-2.0
"""What VIA-SD adds to the start of an engine, and to its memory: seconds from the command to the
first token with `--via-sd` and without, in turn, and what the log says of the copies.

    python benchmarks/via_sd_start.py MODEL
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from measured import machine, set_environment

COPIES = re.compile(r"(\w+) copies of ([\d.]+) GiB of weights take ([\d.]+) GiB")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--engine-args", type=json.loads, default={})
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--engine", choices=["plain", "via-sd"], help=argparse.SUPPRESS)
    return parser.parse_args()


def engine(args: argparse.Namespace) -> None:
    """One engine in this process, up to its first token."""
    from vllm import LLM, SamplingParams

    more: dict[str, Any] = {"additional_config": {"via_sd": True}}
    given = {"max_model_len": 1024, "max_num_seqs": 8} | args.engine_args
    llm = LLM(args.model, **given, **(more if args.engine == "via-sd" else {}))
    llm.generate("Hello", SamplingParams(max_tokens=1), use_tqdm=False)


def start(args: argparse.Namespace, way: str) -> tuple[float, str]:
    """Seconds, and what was logged."""
    command = [sys.executable, *sys.argv, "--engine", way]
    begun = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - begun
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return seconds, done.stdout + done.stderr


def main() -> None:
    args = parse()
    set_environment()
    if args.engine:
        engine(args)
        return
    start(args, "via-sd")  # so that files are in the page cache for both
    plain, with_tier, log = [], [], ""
    for repeat in range(args.repeats):
        for way in ("plain", "via-sd")[:: -1 if repeat % 2 else 1]:
            seconds, printed = start(args, way)
            (plain if way == "plain" else with_tier).append(seconds)
            log = printed if way == "via-sd" else log
        print(f"plain {plain[-1]:.1f} s, --via-sd {with_tier[-1]:.1f} s", flush=True)
    ratios = [a / b - 1 for a, b in zip(with_tier, plain, strict=True)]
    copies = COPIES.search(log)
    memory = "the tier is off"
    if copies:
        kind, weights, needed = copies.group(1), float(copies.group(2)), float(copies.group(3))
        memory = f"{kind}: {needed:.2f} GiB, {needed / weights:.2f} of what they copy"
    print(f"\nmachine: {machine()}")
    print(
        f"{Path(args.model).name}, {json.dumps(args.engine_args)}; {args.repeats} starts of each\n"
    )
    print("| plain | --via-sd | more | copies |", "|---|---|---|---|", sep="\n")
    print(
        f"| {statistics.median(plain):.1f} s | {statistics.median(with_tier):.1f} s | "
        f"{statistics.median(ratios):+.1%} ({min(ratios):+.1%} to {max(ratios):+.1%}) | {memory} |"
    )


if __name__ == "__main__":
    main()
