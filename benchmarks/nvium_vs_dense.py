# SPDX-License-Identifier: Apache-2.0
"""N-vium against its dense twin: tokens per second of both in one run, taking turns on one machine.

What is compared with what, and the limit that each row is held against, is printed above the
table; `docs/benchmarks.md` holds the tables of past runs.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))

from engine_worker import EngineProcess

from vllm_nvium.model_executor.ops.draws import request_seed, uniform_draws

PAPER_SPEEDUP = 1.579
# H 1536, 48 layers, exits after 12/24/36 (arXiv:2605.13190, largest model); the MLP is as wide as
# makes 1.49B parameters with 12 heads of 128 and a vocabulary of 32,000.
PAPER_SHAPE = {
    "hidden_size": 1536,
    "num_hidden_layers": 48,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "intermediate_size": 4224,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
# Gives a mean depth of 60 % with exits at quarters.
PAPER_HAZARD = 0.335


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dense", help="dense checkpoint (Hugging Face folder)")
    parser.add_argument("--exit-layers", default="8,15,23")
    parser.add_argument("--hazards", default="0.3,0.3,0.3")
    parser.add_argument("--paper-shape", action="store_true", help="random weights, paper's shape")
    parser.add_argument("--layers", type=int, help="with --paper-shape: shorten to so many layers")
    parser.add_argument("--batches", default="1,2,4,8,32", help="of the rows that compare")
    parser.add_argument("--prompt-lengths", default="32,128,512", help="requests take turns")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument(
        "--scratch",
        type=Path,
        help="keep converted checkpoints here, and with them vLLM's cache "
        "of what it compiled (default: a temporary folder)",
    )
    return parser.parse_args()


def executed_share(
    batch: int, prompts: list[int], new_tokens: int, seed: int, hazards: list[float], depths: list
) -> float:
    """Share of the layers' weights that the decode steps of one run read.

    A step is as deep as the deepest of its requests; the draws are functions of seed and position,
    so this is what happened, not an expectation.
    """
    deepest = np.zeros(new_tokens - 1, dtype=int)
    for i in range(batch):
        positions = prompts[i] + np.arange(new_tokens - 1)
        seeds = np.full(len(positions), request_seed(seed * 1000 + i, "", 0), dtype=np.uint64)
        leave = uniform_draws(seeds, positions, len(hazards)) < np.asarray(hazards)
        exits = np.where(leave.any(axis=1), leave.argmax(axis=1), len(hazards))
        deepest = np.maximum(deepest, exits)
    return float(np.asarray(depths)[deepest].mean())


def machine() -> str:
    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
            break
    import torch

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"{name} (CPU)"
    return f"{device}, {os.cpu_count()} cores, torch {torch.__version__}"


def make_paper_shape(folder: Path, layers: int) -> Path:
    """A dense model of the paper's largest shape with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(**(PAPER_SHAPE | {"num_hidden_layers": layers}))
    LlamaForCausalLM(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    return folder


def convert_to(out: Path, dense: Path, exit_layers: str, hazards: str) -> str:
    command = [sys.executable, "-m", "vllm_nvium.cli", "convert", "--force", str(dense), str(out)]
    command += ["--exit-layers", exit_layers, "--hazards", hazards]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return str(out)


class Bench:
    """The engines of one run and what was measured on them."""

    def __init__(self, args: argparse.Namespace, engine_args: dict[str, Any]) -> None:
        self.args, self.engine_args = args, engine_args
        self.engines: dict[str, EngineProcess] = {}
        self.prompt_lengths = [int(n) for n in args.prompt_lengths.split(",")]

    def start(self, name: str, model: str, **overrides: Any) -> None:
        self.engines[name] = EngineProcess(name, model, self.engine_args | overrides)

    def prompts(self, batch: int, repeat: int) -> list[int]:
        lengths = self.prompt_lengths
        return [lengths[(i + repeat) % len(lengths)] for i in range(batch)]

    def compare(self, names: dict[str, float], batch: int) -> dict[str, list[dict[str, float]]]:
        """Runs every engine in turn, `repeats` times after one warm-up.

        Args:
            names: engine -> temperature.
        """
        results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        label = f"batch {batch}: {', '.join(names)}"
        for repeat in tqdm(range(self.args.repeats + 1), desc=label, disable=None, leave=False):
            prompts = self.prompts(batch, repeat)
            for name, temperature in names.items():
                measured = self.engines[name].measure(
                    prompts=prompts,
                    new_tokens=self.args.new_tokens,
                    temperature=temperature,
                    seed=repeat,
                )
                if repeat:
                    results[name].append(measured | {"repeat": repeat})
        return results

    def close(self) -> None:
        for engine in self.engines.values():
            engine.close()


def rates(runs: list[dict[str, float]]) -> list[float]:
    """Tokens per second of every run, prefill included."""
    return [(run["tokens"] + run["started"]) / (run["prefill"] + run["decode"]) for run in runs]


def ratios(mine: list[float], other: list[float]) -> str:
    """Median of the ratios pair by pair, with their range: pairs drift together."""
    pairs = [a / b for a, b in zip(mine, other, strict=True)]
    return f"{statistics.median(pairs):.3f} ({min(pairs):.3f}-{max(pairs):.3f})"


def ideal_rates(
    bench: Bench,
    dense: list[dict[str, float]],
    half: list[dict[str, float]],
    batch: int,
    depths: list[float],
    kept: float,
) -> tuple[list[float], float]:
    """What N-vium could reach: dense time outside the layers + layer time x share executed.

    Args:
        half: runs of the dense model with the share `kept` of its layers: the difference to the
            whole is layer time.

    Returns:
        tokens per second of every run; median share of layer weights executed.
    """
    args, hazards = bench.args, [float(h) for h in bench.args.hazards.split(",")]
    layer_time = statistics.median(
        (a["decode"] - b["decode"]) / (1 - kept) for a, b in zip(dense, half, strict=True)
    )
    result, shares = [], []
    for run in dense:
        repeat = int(run["repeat"])
        prompts = bench.prompts(batch, repeat)
        share = executed_share(batch, prompts, args.new_tokens, repeat, hazards, depths)
        decode = run["decode"] - layer_time * (1 - share)
        result.append((run["tokens"] + run["started"]) / (run["prefill"] + decode))
        shares.append(share)
    return result, statistics.median(shares)


def main() -> None:
    args = parse()
    if bool(args.dense) == args.paper_shape:
        raise SystemExit("give either --dense FOLDER or --paper-shape")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    engine_args = {
        "dtype": "bfloat16",
        "max_model_len": 1024,
        "max_num_seqs": 32,
        "enforce_eager": args.enforce_eager,
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
    }
    with tempfile.TemporaryDirectory() as temporary:
        scratch = args.scratch or Path(temporary)
        scratch.mkdir(parents=True, exist_ok=True)
        bench = Bench(args, engine_args)
        try:
            lines = run(args, bench, scratch)
        finally:
            bench.close()
    print("\n".join(lines))


def run(args: argparse.Namespace, bench: Bench, scratch: Path) -> list[str]:
    mode = "--enforce-eager" if args.enforce_eager else "default compilation"
    dense = Path(args.dense) if args.dense else scratch / "dense"
    if args.paper_shape:
        layers = args.layers or PAPER_SHAPE["num_hidden_layers"]
        if not (dense / "config.json").exists():
            make_paper_shape(dense, layers)
        args.exit_layers = ",".join(str(layers * k // 4) for k in (1, 2, 3))
        args.hazards = ",".join([str(PAPER_HAZARD)] * 3)
    config = json.loads((dense / "config.json").read_text())
    num_layers = config["num_hidden_layers"]
    depths = [int(layer) / num_layers for layer in args.exit_layers.split(",")] + [1.0]
    half_layers = num_layers // 2
    shape = ", ".join(
        f"{key} {config[key]}"
        for key in ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")
    )
    lines = [
        f"machine: {machine()}",
        f"model: {dense.name} ({shape}), bfloat16, exits after {args.exit_layers}",
        f"flags: {mode}; prompts of {args.prompt_lengths} random tokens, {args.new_tokens} new "
        f"tokens, {args.repeats} runs in turn, medians; prefill included",
        "",
        "| row | batch | dense tok/s | N-vium tok/s | N-vium / dense | / ideal | layers run |",
        "|---|---|---|---|---|---|---|",
    ]
    batches = [int(batch) for batch in args.batches.split(",")]
    bench.start("dense", str(dense))
    bench.start(
        "half", str(dense), load_format="dummy", hf_overrides={"num_hidden_layers": half_layers}
    )
    nvium = convert_to(scratch / "nvium", dense, args.exit_layers, args.hazards)
    bench.start("nvium", nvium)
    if not args.paper_shape:
        off = convert_to(scratch / "off", dense, args.exit_layers, "0")
        bench.start("off", off)
        for batch in [b for b in batches if b in (1, 8, 32)]:
            found = bench.compare({"dense": 0.0, "off": 0.0}, batch)
            mine, other = rates(found["off"]), rates(found["dense"])
            lines.append(
                f"| routing off, greedy | {batch} | {statistics.median(other):.1f} | "
                f"{statistics.median(mine):.1f} | {ratios(mine, other)} | | 100 % |"
            )
    for batch in [b for b in batches if b <= 8]:
        found = bench.compare({"dense": 1.0, "nvium": 1.0, "half": 1.0}, batch)
        mine, other = rates(found["nvium"]), rates(found["dense"])
        kept = half_layers / num_layers
        ideal, share = ideal_rates(bench, found["dense"], found["half"], batch, depths, kept)
        lines.append(
            f"| hazards {args.hazards}, T=1 | {batch} | {statistics.median(other):.1f} | "
            f"{statistics.median(mine):.1f} | {ratios(mine, other)} | {ratios(mine, ideal)} | "
            f"{share:.0%} |"
        )
    if args.paper_shape:
        lines += ["", f"The paper reports {PAPER_SPEEDUP}x at this shape (A100, batch 1)."]
    return lines


if __name__ == "__main__":
    main()
