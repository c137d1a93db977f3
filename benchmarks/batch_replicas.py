# SPDX-License-Identifier: Apache-2.0
"""What Ray costs a batch job: rows per second of `vllm-nvium batch --replicas N` over those of N
engines that are each handed their part of the same rows, with as many cores; both once they are up.

    python benchmarks/batch_replicas.py MODEL --prompts FILE
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from measured import machine, read_texts, set_environment

from vllm_nvium.batch.engine import PASSED_ON
from vllm_nvium.environment import environment_for

RATE = re.compile(r"([\d.]+) rows/s")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines with prompt")
    parser.add_argument(
        "--rows", type=int, default=384, help="of few rows the last ones leave engines idle"
    )
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--max-num-seqs", type=int, default=16, help="of each engine")
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    return parser.parse_args()


def rows_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    texts = read_texts(args.prompts)
    return [
        {"prompt": texts[i % len(texts)], "max_tokens": args.new_tokens, "temperature": 1.0,
         "seed": i, "ignore_eos": True}
        for i in range(args.rows)
    ]  # fmt: skip


def engine(args: argparse.Namespace) -> None:
    """One engine by itself: says when it is up, waits for a line, answers, says when it is done."""
    from vllm import LLM, SamplingParams

    rows = json.loads(Path(args.engine).read_text())
    llm = LLM(
        args.model,
        max_num_seqs=args.max_num_seqs,
        max_model_len=args.max_model_len,
        dtype=args.dtype,
        enforce_eager=True,
        gpu_memory_utilization=0.3,
    )
    prompts = [row.pop("prompt") for row in rows]
    print("up", flush=True)
    sys.stdin.readline()
    found = llm.generate(prompts, [SamplingParams(**row) for row in rows], use_tqdm=False)
    assert len(found) == len(rows)
    print("done", flush=True)


def engines_rate(args: argparse.Namespace, rows: list[dict[str, Any]], folder: Path) -> float:
    """Rows per second of engines by themselves."""
    suited = environment_for(args.model, os.environ)
    environment = os.environ | {k: v for k, v in suited.items() if k.startswith(PASSED_ON)}
    # As a replica has it: a core of its own in Ray's books, and no thread bound to one.
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"}
    environment["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // args.replicas))
    running = []
    for number in range(args.replicas):
        part = folder / f"part-{number}.json"
        part.write_text(json.dumps(rows[number :: args.replicas]))
        command = [*[sys.executable, *sys.argv], "--engine", str(part)]
        running.append(
            subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        )
    for process in running:
        wait_for(process, "up")
    begun = time.perf_counter()
    for process in running:
        process.stdin.write("\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
    for process in running:
        wait_for(process, "done")
    seconds = time.perf_counter() - begun
    for process in running:
        process.communicate()
    return len(rows) / seconds


def wait_for(process: "subprocess.Popen[str]", word: str) -> None:
    for line in process.stdout:  # type: ignore[union-attr]
        if line.strip() == word:
            return
    raise SystemExit(f"an engine ended before it was {word}")


def job_rate(args: argparse.Namespace, rows: list[dict[str, Any]], folder: Path) -> float:
    """Rows per second that the job tells at its end: from when the first replica was up."""
    source, output = folder / "in.jsonl", folder / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "vllm_nvium.cli", "batch", str(source), str(output)]
    command += ["--model", args.model, "--replicas", str(args.replicas), "--enforce-eager"]
    command += ["--max-num-seqs", str(args.max_num_seqs), "--gpu-memory-utilization", "0.3"]
    command += ["--max-model-len", str(args.max_model_len), "--dtype", args.dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = RATE.findall(done.stdout)
    if done.returncode or not found or len(output.read_text().splitlines()) != len(rows):
        raise SystemExit(done.stdout + done.stderr)
    output.unlink()
    return float(found[-1])


def main() -> None:
    args = parse()
    set_environment()
    if args.engine:
        engine(args)
        return
    rows = rows_of(args)
    jobs, engines = [], []
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(args.repeats):
            ways = [(jobs, job_rate), (engines, engines_rate)]
            for rates, rate in ways[:: -1 if repeat % 2 else 1]:
                rates.append(rate(args, rows, Path(folder)))
            print(f"job {jobs[-1]:.3f} rows/s, engines {engines[-1]:.3f}", flush=True)
    ratios = [a / b for a, b in zip(jobs, engines, strict=True)]
    print(f"\nmachine: {machine()}")
    print(
        f"{Path(args.model).name}, {args.rows} rows of {args.prompts.name}, {args.new_tokens} new "
        f"tokens, {args.replicas} replicas of {args.max_num_seqs} sequences, {args.repeats} runs\n"
    )
    print("| job rows/s | engines rows/s | job / engines |", "|---|---|---|", sep="\n")
    print(
        f"| {statistics.median(jobs):.2f} | {statistics.median(engines):.2f} | "
        f"{statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f}) |"
    )


if __name__ == "__main__":
    main()
