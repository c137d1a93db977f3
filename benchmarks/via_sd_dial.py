# SPDX-License-Identifier: Apache-2.0
"""VIA-SD on constructed targets, whose slim verifier is as cheap and as right as asked: a real
model between whose layers others are inserted that change little. Tells when the tier pays, and how
near the controller comes to the best that the measured pass times and acceptances allow.

Inserted layers are copies of the one before them with random output projections; their scale is
what sets how often the model without them says the same. The slim verifier skips them all.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))

from engine_worker import Worker
from measured import machine, read_prompts

from vllm_nvium.spec_decode.controller import Plan, RoundController

# The cells in which tier and plain speculative decoding must not be confused.
CLEAR = 1.05


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path, help="Llama checkpoint to insert layers into (folder)")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines")
    parser.add_argument("--drafter", default="ngram", help="ngram, or a checkpoint")
    parser.add_argument("--costs", default=".3,.4,.55,.7", help="of a slim pass, in full ones")
    parser.add_argument("--agreements", default=".8,.9,.95,.98", help="of slim and full tokens")
    parser.add_argument("--mode", choices=("lossless", "paper"), default="lossless")
    parser.add_argument("--mask", default="", help="measure BASE itself, with this --via-sd-mask")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--max-drafts", type=int, default=6)
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=6, help="prompts, each with every plan")
    parser.add_argument("--warm-up", type=int, default=3, help="prompts before them")
    return parser.parse_args()


# --- Targets --------------------------------------------------------------------------------------


def inserted(kept: int, extra: int) -> list[int]:
    """Layers of the expanded model that are not the base's: evenly between its first and last."""
    total, gaps = kept + extra, kept - 1
    behind = [extra * (i + 1) // gaps - extra * i // gaps for i in range(gaps)] + [0]
    found, layer = [], 0
    for count in behind:
        found += range(layer + 1, layer + 1 + count)
        layer += 1 + count
    assert layer == total
    return found


def extra_layers(base: Any, cost: float) -> int:
    """Layers to insert so that the base reads `cost` of the expanded model's weight bytes."""
    layer = sum(p.numel() for p in base.model.layers[0].parameters())
    whole = sum(p.numel() for p in base.parameters())  # a tied head is read once, and counted once
    return round(whole * (1 / cost - 1) / layer)


def expanded(base: Any, extra: int) -> tuple[Any, list[int], list[tuple[Any, torch.Tensor]]]:
    """The model with its inserted layers, which are those, and the matrices that tell what they
    change, each with the noise that it takes at scale 1."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kept = base.config.num_hidden_layers
    new = inserted(kept, extra)
    values = base.config.to_dict() | {"num_hidden_layers": kept + extra}
    values.pop("layer_types", None)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**values), dtype=base.dtype
    ).eval()
    model.load_state_dict(
        {k: v for k, v in base.state_dict().items() if ".layers." not in k}, strict=False
    )
    draw = torch.Generator().manual_seed(0)
    noise, old = [], iter(base.model.layers)
    for i, layer in enumerate(model.model.layers):
        if i not in new:
            state = next(old).state_dict()
        layer.load_state_dict(state)
        if i in new:
            for matrix in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
                scale = matrix.detach().float().std()
                noise.append((matrix, torch.randn(matrix.shape, generator=draw) * scale))
    return model, new, noise


def set_agreement(
    model: Any, noise: list[tuple[Any, torch.Tensor]], base: Any, texts: list[list[int]], at: float
) -> float:
    """Scales the noise until the base's most likely tokens are the model's that often; returns how
    often they are."""

    @torch.inference_mode()
    def best(of: Any) -> torch.Tensor:
        return torch.cat([of(torch.tensor([ids])).logits[0].argmax(-1) for ids in texts])

    expected = best(base)

    def agreement(scale: float) -> float:
        with torch.no_grad():
            for matrix, values in noise:
                matrix.copy_(values * scale)
        return (best(model) == expected).float().mean().item()

    low, high = 0.0, 1.0
    found = agreement(high)
    for _ in range(9):
        if abs(found - at) < 0.006:
            break
        middle = (low + high) / 2
        found = agreement(middle)
        low, high = (middle, high) if found > at else (low, middle)
    return found


# --- One cell, in a process of its own ------------------------------------------------------------


class Recorder(RoundController):
    """Learns as ever, and plans what it is told."""

    fixed = Plan(0, 0)

    def plan(self, request_ids: Any) -> Plan:
        self._step += 1
        return self.fixed

    def another_round(self, window_lengths: Any, rounds_done: int, request_ids: Any) -> bool:
        return bool(request_ids) and rounds_done < self.fixed.rounds


def measure(model: str, mask: str, prompts: list[list[int]], args: Any) -> dict[str, Any]:
    """Tokens per second of plain decoding, of the best plans with and without the tier, and of the
    controller, which take turns; and what the measured times and acceptances allow."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"

    drafter: dict[str, Any] = {"method": "draft_model", "model": args.drafter}
    if args.drafter == "ngram":
        drafter = {"method": "ngram", "prompt_lookup_min": 2, "prompt_lookup_max": 4}
    options = {"mask": mask, "mode": args.mode, "window": args.window}
    worker = Worker(
        model,
        {
            "dtype": "bfloat16",
            "max_model_len": max(map(len, prompts)) + args.new_tokens + 64,
            "max_num_seqs": args.batch,
            "gpu_memory_utilization": 0.5,  # on CPU what must be free at the start
            "enforce_eager": args.enforce_eager,
            "enable_prefix_caching": False,
            "skip_tokenizer_init": True,
            "async_scheduling": False,
            "speculative_config": drafter | {"num_speculative_tokens": args.max_drafts},
            "additional_config": {"via_sd": True} | {f"via_sd_{k}": v for k, v in options.items()},
        },
    )
    runner = worker.engine.collective_rpc(lambda each: [each.model_runner])[0][0]
    auto, recorder = runner.controller, Recorder(args.max_drafts, args.window)

    def run(number: int, controller: RoundController, plan: Plan | None = None) -> float:
        """Tokens per second of a batch's decode steps."""
        runner.controller = controller
        if plan is not None:
            recorder.fixed = plan
        batch = [prompts[(number * args.batch + i) % len(prompts)] for i in range(args.batch)]
        worker.begin(batch, args.new_tokens, temperature=0.0, seed=number)
        tokens, seconds, unfinished = 0, 0.0, True
        while unfinished:
            step = worker.step()
            unfinished = step["unfinished"]
            if not step["prefill"]:
                tokens += step["tokens"]
                seconds += step["seconds"]
        return tokens / seconds

    plans = {"plain": Plan(0, 0), "speculative": Plan(4, 0), "tier": Plan(2, 2)}
    for number in range(args.warm_up):
        run(number, auto)
        for plan in plans.values():
            run(number, recorder, plan)
    best_plans(recorder, plans, args.mode, args.batch)
    before = dict(auto.snapshot()["steps"])
    found: dict[str, list[float]] = {name: [] for name in (*plans, "auto")}
    for number in range(args.warm_up, args.warm_up + args.repeats):
        names, turn = list(found), number % len(found)
        for name in names[turn:] + names[:turn]:  # nobody always follows the same plan
            known = plans.get(name)
            found[name].append(run(number, recorder if known else auto, known))
    # What is possible by what was seen until now.
    allowed = best_plans(recorder, dict(plans), args.mode, args.batch)
    steps = {k: v - before[k] for k, v in auto.snapshot()["steps"].items()}
    seen, counts = recorder.snapshot(), runner.counts
    return {
        "rates": found,
        "plans": {name: (plan.drafts, plan.rounds) for name, plan in plans.items()},
        "allowed": allowed,
        "steps": steps,
        "acceptance": seen["acceptance"][args.mode],
        "seconds": {
            kind: statistics.median(seen["seconds"][kind].values()) for kind in ("full", "slim")
        },
        "at full": counts.accepted / max(counts.window_tokens, 1),
    }


def best_plans(
    recorder: Recorder, plans: dict[str, Plan], rule: str, batch: int
) -> dict[str, float]:
    """Sets the best plans with and without the tier; returns the tokens per second that all of them
    promise."""
    names = [f"like the others, {i}" for i in range(batch)]
    for name in names:
        recorder.add(name, rule)
    promised = recorder.outlook(names)
    assert promised is not None
    rates = promised.rates
    plain = 1 + int(rates[1:, 0].argmax())
    drafts, rounds = divmod(int(rates[1:, 1:].argmax()), rates.shape[1] - 1)
    plans["speculative"], plans["tier"] = Plan(plain, 0), Plan(1 + drafts, 1 + rounds)
    return {name: float(rates[plan.drafts, plan.rounds]) for name, plan in plans.items()}


# --- The table ------------------------------------------------------------------------------------


def row(cost: float, at: float, agreement: float, found: dict[str, Any]) -> str:
    """One cell."""
    rates = {name: statistics.median(values) for name, values in found["rates"].items()}
    optimum = max(found["allowed"].values())
    best = max(rates["plain"], rates["speculative"])
    seconds, shares = found["seconds"], found["acceptance"]
    steps = found["steps"]
    tiered = steps["tiered"] / max(sum(steps.values()), 1)
    gain = rates["tier"] / best
    side = "either"
    if not 1 / CLEAR < gain < CLEAR:
        side = "right" if (tiered > 0.5) == (gain > 1) else "WRONG"
    cells = [
        f"{cost or ''} / {seconds['slim'] / seconds['full']:.2f}",
        f"{at} / {agreement:.2f}" if at else "",
    ]
    cells += [f"{shares['at_full']:.2f}, {shares['at_slim']:.2f}, {shares['slim']:.2f}"]
    cells += [f"{rates[name]:.1f}" for name in ("plain", "speculative", "tier", "auto")]
    cells += [f"{rates['auto'] / best:.3f}", f"{optimum:.1f}", f"{rates['auto'] / optimum:.3f}"]
    cells += [f"{gain:.3f}", f"{tiered:.0%}", side]
    cells += [", ".join(f"{d}x{r}" for d, r in found["plans"].values())]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    from transformers import AutoModelForCausalLM

    args = parse()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    prompts = read_prompts(args.prompts, str(args.base), 256, chat=False)
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.bfloat16).eval()
    cells = [
        (float(c), float(a)) for c in args.costs.split(",") for a in args.agreements.split(",")
    ]
    what = f"mask {args.mask} of" if args.mask else "constructed targets from"
    mode = "--enforce-eager" if args.enforce_eager else "default compilation"
    lines = [
        f"machine: {machine()}",
        f"{what} {args.base.name}, drafter {Path(args.drafter).name}, bfloat16, "
        f"{mode}, batch {args.batch}, greedy, {args.mode}, prompts {args.prompts.name}, "
        f"{args.new_tokens} new tokens, {args.repeats} prompts after {args.warm_up}, medians of "
        "decode steps, plans in turn in one engine",
        "",
        "| slim cost: bytes / measured | agreement: asked / teacher-forced | acceptance: drafts at "
        "full, at slim, slim at full | plain tok/s | best drafts | best tier | auto | auto / best "
        "without tier | optimum | auto / optimum | tier / best without | steps in the tier | side "
        "| plans (drafts x rounds) |",
        "|" + "---|" * 14,
    ]
    if args.mask:
        lines.append(row(0.0, 0.0, 0.0, alone(str(args.base), args.mask, prompts, args)))
        print("\n".join(lines))
        return
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.bfloat16).eval()
    for cost, at in tqdm(cells, desc="cells", disable=None):
        with tempfile.TemporaryDirectory() as folder:
            model, new, noise = expanded(base, extra_layers(base, cost))
            agreement = set_agreement(model, noise, base, prompts[-6:], at)
            model.save_pretrained(folder)
            del model, noise
            found = alone(folder, ",".join(map(str, new)), prompts[:-6], args)
        lines.append(row(cost, at, agreement, found))
        tqdm.write(lines[-1], file=sys.stderr)
        tqdm.write(json.dumps(found), file=sys.stderr)
    print("\n".join(lines))


def alone(*args: Any) -> dict[str, Any]:
    """`measure` in a process of its own, so that its weights are gone afterwards."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, *args).result()


if __name__ == "__main__":
    main()
