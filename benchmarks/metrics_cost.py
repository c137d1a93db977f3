# SPDX-License-Identifier: Apache-2.0
"""What the metrics of N-vium and of VIA-SD cost: the time inside the functions that make them, as a
share of the engine steps around them; with metrics alone, and with a value for each token besides.

    python benchmarks/metrics_cost.py NVIUM_CHECKPOINT
    python benchmarks/metrics_cost.py MODEL --engine-args '{"additional_config": {"via_sd": true}}'

Two engines with one model, or one engine at two times, differ by more than what is measured here.
The engine and the loggers run in one process, one after the other; `vllm serve` has the loggers in
another process, beside the steps.
"""

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from measured import machine, set_environment


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="an N-vium checkpoint, or a dense one for VIA-SD")
    parser.add_argument("--engine-args", type=json.loads, default={})
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--prompt-length", type=int, default=32, help="of random tokens")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


class Stopwatch:
    """Seconds inside functions; one that another of them calls counts once."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0

    def watch(self, owner: Any, name: str) -> None:
        setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += time.perf_counter() - start

        return timed


def watch_metrics(watch: Stopwatch) -> None:
    """All that is called for metrics, in the runner, the scheduler and the front end."""
    from vllm_nvium.engine import request_metrics, stats
    from vllm_nvium.engine.patches import output_processor, scheduler
    from vllm_nvium.nvium.stats import StepObserver
    from vllm_nvium.via_sd.session import Session
    from vllm_nvium.via_sd.stats import ViaSDCounts

    for owner, names in (
        (StepObserver, "observe report"),
        (ViaSDCounts, "observe_window"),
        (Session, "report"),
        (request_metrics.TokenNotes, "note"),
        (scheduler, "take_notes send"),
        (stats, "put"),
        (output_processor, "received"),
        (request_metrics.Told, "add"),
        (request_metrics.AnswerFormat, "describe merge"),
        (stats.MethodStatLogger, "record"),
    ):
        for name in names.split():
            watch.watch(owner, name)


def main() -> None:
    args = parse()
    set_environment()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from engine_worker import Worker
    from tqdm import tqdm

    batches = [int(batch) for batch in args.batches.split(",")]
    engine_args: dict[str, Any] = {
        "dtype": "bfloat16",
        "max_model_len": 512,
        "max_num_seqs": max(batches),
        "enable_prefix_caching": False,
        "gpu_memory_utilization": 0.3,
        "disable_log_stats": False,
        "enforce_eager": True,
        "skip_tokenizer_init": True,
    }
    worker = Worker(args.model, engine_args | args.engine_args)
    is_via_sd = (args.engine_args.get("additional_config") or {}).get("via_sd", False)
    option = f"{'via_sd' if is_via_sd else 'nvium'}_request_metrics"
    watch = Stopwatch()
    watch_metrics(watch)

    def share(batch: int, repeats: int, extra_args: dict[str, Any] | None) -> str:
        watch.seconds = seconds = steps = 0
        for repeat in tqdm(range(repeats), desc=f"batch {batch}", disable=None, leave=False):
            worker.begin(
                [args.prompt_length] * batch, args.new_tokens, args.temperature, seed=repeat,
                extra_args=extra_args,
            )  # fmt: skip
            unfinished = True
            while unfinished:
                step = worker.step()
                steps, seconds = steps + 1, seconds + step["seconds"]
                unfinished = step["unfinished"]
        found = 1e6 * watch.seconds / steps
        return f"{1e3 * seconds / steps:.1f} ms | {found:.0f} us | {watch.seconds / seconds:.2%}"

    lines = []
    for batch in batches:
        share(batch, 1, None)  # a warm-up
        for what, extra_args in (("metrics", None), ("detailed", {option: "detailed"})):
            lines.append(f"| {batch} | {what} | {share(batch, args.repeats, extra_args)} |")
            print(lines[-1], flush=True)
    print(f"\nmachine: {machine()}")
    print(
        f"{Path(args.model).name}, {json.dumps(engine_args | args.engine_args)}; "
        f"T={args.temperature:g}, {args.prompt_length} + {args.new_tokens} tokens, means of "
        f"{args.repeats} runs\n"
    )
    print("| batch | | a step | of it for metrics | share |", "|---|---|---|---|---|", sep="\n")
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
