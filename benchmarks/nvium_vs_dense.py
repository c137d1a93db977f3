# SPDX-License-Identifier: Apache-2.0
"""N-vium against its dense twin: tokens per second of both in one run, taking turns on one machine.

What is compared with what, and the limit that each row is held against, is printed above the
table; `docs/results/nvium_speed.md` holds the tables of past runs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))

from engine_worker import EngineProcess, steps_in_turn
from measured import machine, rates, ratios, read_prompts

from vllm_nvium.model_executor.nvium.policy import first_exit, leaves, thresholds
from vllm_nvium.model_executor.ops.draws import request_seed

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
    parser.add_argument(
        "--nvium",
        type=Path,
        help="an N-vium checkpoint made from --dense, with routers of its own: instead of constant "
        "hazards it is compared, on --prompts",
    )
    parser.add_argument(
        "--prompts", type=Path, help="with --nvium: JSON lines with question, prompt or turns"
    )
    parser.add_argument("--batches", default="1,2,4,8,32", help="of the rows that compare")
    parser.add_argument("--prompt-lengths", default="32,128,512", help="requests take turns")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        help="engines of every kind, whose times are averaged: where a process's memory happens to "
        "lie makes two engines of the same model differ by a few per cent",
    )
    parser.add_argument(
        "--scratch",
        type=Path,
        help="keep converted checkpoints here, and with them vLLM's cache "
        "of what it compiled (default: a temporary folder)",
    )
    return parser.parse_args()


def longest_context(model: str | None, most: int = 1024) -> int:
    """Tokens of a context: a small model may know fewer positions. N-vium has them in the
    configuration of its parent."""
    if model is None:
        return most
    config = json.loads((Path(model) / "config.json").read_text())
    return min(most, int(config.get("text_config", config)["max_position_embeddings"]))


def executed_share(
    batch: int, prompts: list[int], new_tokens: int, seed: int, hazards: list[float], depths: list
) -> float:
    """Share of the layers' weights that the decode steps of one run read.

    A step is as deep as the deepest of its requests; the draws are functions of seed and position,
    so this is what happened, not an expectation.
    """
    deepest = np.zeros(new_tokens - 1, dtype=int)
    with np.errstate(divide="ignore"):
        margins = np.log(hazards) - np.log1p(-np.asarray(hazards))
    for i in range(batch):
        positions = prompts[i] + np.arange(new_tokens - 1)
        seeds = np.full(len(positions), request_seed(seed * 1000 + i, "", 0), dtype=np.uint64)
        sampled = np.zeros(len(positions), dtype=bool)
        needed = thresholds(seeds, positions, sampled, 0.0, len(hazards))
        exits = first_exit(torch.from_numpy(leaves(margins, needed))).numpy()
        deepest = np.maximum(deepest, exits)
    return float(np.asarray(depths)[deepest].mean())


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
    """The engines of one run and what was measured on them.

    Attributes:
        whole_runs: take turns run by run instead of step by step, see `steps_in_turn`.
        warm_up: runs before those that count.
    """

    whole_runs = False
    warm_up = 1

    def __init__(self, args: argparse.Namespace, engine_args: dict[str, Any]) -> None:
        self.args, self.engine_args = args, engine_args
        self.engines: dict[str, list[EngineProcess]] = {}
        self.prompt_lengths = [int(n) for n in args.prompt_lengths.split(",")]
        longest = min(512, engine_args["max_model_len"] - args.new_tokens)
        self.texts = read_prompts(args.prompts, args.dense, longest) if args.prompts else []
        # Share of the layers in the first one, two, ... segments of the N-vium model.
        self.depths: list[float] = []

    def start(self, name: str, model: str, checkout: Path | None = None, **overrides: Any) -> None:
        """`processes` engines of one kind; see `EngineProcess`."""
        self.engines[name] = [
            EngineProcess(name, model, self.engine_args | overrides, checkout)
            for _ in range(self.args.processes)
        ]

    def stop(self, name: str) -> None:
        """Frees the memory of engines that no further row needs."""
        for engine in self.engines.pop(name):
            engine.close()

    def prompts(self, batch: int, repeat: int) -> list[Any]:
        """Lengths of random prompts, or the token ids of real ones."""
        if self.texts:
            first = repeat * batch
            return [self.texts[(first + i) % len(self.texts)] for i in range(batch)]
        lengths = self.prompt_lengths
        return [lengths[(i + repeat) % len(lengths)] for i in range(batch)]

    def compare(self, names: dict[str, float], batch: int) -> dict[str, list[dict[str, float]]]:
        """Runs the same batch on every engine, `repeats` times after the warm-up.

        Args:
            names: engine -> temperature.
        """
        results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        label = f"batch {batch}: {', '.join(names)}"
        num_runs = self.warm_up + self.args.repeats
        for repeat in tqdm(range(num_runs), desc=label, disable=None, leave=False):
            for name, temperature in names.items():
                for engine in self.engines[name]:
                    engine.begin(
                        prompts=self.prompts(batch, repeat),
                        new_tokens=self.args.new_tokens,
                        temperature=temperature,
                        seed=repeat,
                    )
            first = repeat % len(names)
            order = list(names)
            runs = self.take_turns(order[first:] + order[:first])
            if repeat >= self.warm_up:
                for name, run in runs.items():
                    results[name].append(run | {"repeat": repeat})
        return results

    def take_turns(self, names: list[str]) -> dict[str, dict[str, float]]:
        """Runs the batches that have begun, in turn, until all are done.

        Returns:
            name -> seconds of `prefill` (every request has its first token) and `decode`, and the
            new `tokens`, means over the name's engines; and of an N-vium model the sum of what
             its decoding `steps` ran (`depth`, as shares of the layers).
        """
        fields = ("prefill", "decode", "tokens", "depth", "steps")
        runs = {name: dict.fromkeys(fields, 0.0) for name in names}
        engines = [engine for name in names for engine in self.engines[name]]
        for engine, step in steps_in_turn(engines, self.whole_runs):
            run, share = runs[engine.name], 1 / len(self.engines[engine.name])
            run["prefill" if step["prefill"] else "decode"] += share * step["seconds"]
            run["tokens"] += share * step["tokens"]
            if not step["prefill"] and step["depth"]:
                run["depth"] += self.depths[step["depth"] - 1]
                run["steps"] += 1
        return runs

    def close(self) -> None:
        for name in list(self.engines):
            self.stop(name)


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
        result.append(run["tokens"] / (run["prefill"] + decode))
        shares.append(share)
    return result, statistics.median(shares)


def trained_rows(bench: Bench, batches: list[int]) -> list[str]:
    """A model with routers of its own, sampled and greedy."""
    lines = []
    for batch in batches:
        for law, temperature in (("T=1", 1.0), ("greedy", 0.0)):
            found = bench.compare({"dense": temperature, "nvium": temperature}, batch)
            mine, other = rates(found["nvium"]), rates(found["dense"])
            steps = sum(run["steps"] for run in found["nvium"])
            mean = sum(run["depth"] for run in found["nvium"]) / steps
            lines.append(
                f"| trained routers, {law} | {batch} | {statistics.median(other):.1f} | "
                f"{statistics.median(mine):.1f} | {ratios(mine, other)} | | {mean:.0%} |"
            )
    return lines


def main() -> None:
    args = parse()
    if bool(args.dense) == args.paper_shape:
        raise SystemExit("give either --dense FOLDER or --paper-shape")
    if bool(args.nvium) != bool(args.prompts) or (args.nvium and args.paper_shape):
        raise SystemExit("--nvium and --prompts go together, with --dense")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    engine_args = {
        "dtype": "bfloat16",
        "max_model_len": longest_context(args.dense),
        "max_num_seqs": 32,
        # Whole prompts: vLLM 0.32 on CPU stops at a seeded request whose prompt comes in chunks.
        "max_num_batched_tokens": max(1024, 512 * max(map(int, args.batches.split(",")))),
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
    dense = Path(args.dense or scratch)
    if args.paper_shape:
        layers = args.layers or PAPER_SHAPE["num_hidden_layers"]
        dense = scratch / f"dense-{layers}"
        if not (dense / "config.json").exists():
            make_paper_shape(dense, layers)
        args.exit_layers = ",".join(str(layers * k // 4) for k in (1, 2, 3))
        args.hazards = ",".join([str(PAPER_HAZARD)] * 3)
    if args.nvium:
        exits = json.loads((args.nvium / "config.json").read_text())["exit_layers"]
        args.exit_layers = ",".join(map(str, exits))
    config = json.loads((dense / "config.json").read_text())
    num_layers = config["num_hidden_layers"]
    depths = [int(layer) / num_layers for layer in args.exit_layers.split(",")] + [1.0]
    bench.depths = depths
    half_layers = num_layers // 2
    shape = ", ".join(
        f"{key} {config[key]}"
        for key in ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")
    )
    prompts = args.prompts.name if args.prompts else f"of {args.prompt_lengths} random tokens"
    lines = [
        f"machine: {machine()}",
        f"model: {dense.name} ({shape}), bfloat16, exits after {args.exit_layers}",
        f"flags: {mode}; prompts {prompts}, {args.new_tokens} new "
        f"tokens, {args.repeats} runs, {args.processes} engines of each kind, steps in turn, "
        "medians; prefill included",
        "",
        "| row | batch | dense tok/s | N-vium tok/s | N-vium / dense | / ideal | layers run |",
        "|---|---|---|---|---|---|---|",
    ]
    batches = [int(batch) for batch in args.batches.split(",")]
    bench.start("dense", str(dense))
    if args.nvium:
        bench.start("nvium", str(args.nvium))
        return lines + trained_rows(bench, batches)
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
        bench.stop("off")
    bench.start(
        "half", str(dense), load_format="dummy", hf_overrides={"num_hidden_layers": half_layers}
    )
    bench.start("nvium", convert_to(scratch / "nvium", dense, args.exit_layers, args.hazards))
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
