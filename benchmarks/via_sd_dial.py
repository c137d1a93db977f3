# SPDX-License-Identifier: Apache-2.0
"""VIA-SD on constructed targets, whose slim verifier is as cheap and as right as asked: a real
model between whose layers others are inserted that change little. Tells when the tier pays, and how
near the planner comes to the best that the measured pass times and acceptances allow.

    python benchmarks/via_sd_dial.py SmolLM2-135M-Instruct --prompts humaneval.jsonl \\
        --modes lossless,paper --enforce-eager --out dial.jsonl

--by-cost judges the planner without noise and without a quiet machine: the engine runs as ever
and its passes count for what they are said to cost. A draft model costs its weight bytes, too.

Inserted layers are copies of the one before them with random output projections; their scale is
what sets how often the model without them says the same. The slim verifier skips them all.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))

from measured import read_prompts
from via_sd_plans import (
    SPREAD,
    Case,
    about_run,
    add_arguments,
    at_hand,
    best_without_tier,
    cases_of,
    copied_share,
    learning,
    measure,
    rate,
    rate_at_means,
    ratio,
    results,
    side,
    tier_share,
)

# Prompts on which agreement is set and nothing is timed.
HELD_OUT = 6


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", type=Path, help="Llama checkpoint to insert layers into (folder)")
    parser.add_argument("--costs", default=".3,.4,.55,.7", help="of a slim pass, in full ones")
    parser.add_argument("--agreements", default=".8,.9,.95,.98", help="of slim and full tokens")
    parser.add_argument(
        "--by-cost",
        action="store_true",
        help="time nothing: a full pass counts for 100 ms, a slim pass for its cost, n-grams for "
        "nothing, a draft model's drafts for its weight bytes",
    )
    parser.add_argument(
        "--targets", type=Path, help="folder to keep constructed targets in, and to take them from"
    )
    add_arguments(parser)
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


def by_cost(cost: float, base: Any, drafter: str) -> str:
    """Pass times of a target of which the base reads `cost` of the weight bytes, as `--pass-times`
    takes them: milliseconds of a full and of a slim pass, and of a draft."""
    from transformers import AutoConfig, AutoModelForCausalLM

    times = f"100:{100 * cost:g}"
    if drafter == "ngram":
        return times
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(drafter))
    sizes = [sum(p.numel() for p in each.parameters()) for each in (model, base)]
    return f"{times}:{100 * cost * sizes[0] / sizes[1]:.3g}"


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


def construct(
    target: Path, base: Any, size: float, asked: float, held_out: list[list[int]]
) -> None:
    """Writes a target of which the base is the share `size`, and what the dial needs to know of it:
    `agreement` as it became, and `mask`, the layers that are not the base's."""
    model, new, noise = expanded(base, extra_layers(base, size))
    agreement = set_agreement(model, noise, base, held_out, asked)
    beside = target.with_name(target.name + ".part")
    model.save_pretrained(beside)
    made = {"agreement": agreement, "mask": ",".join(map(str, new))}
    (beside / "dial.json").write_text(json.dumps(made))
    beside.rename(target)


# --- The table ------------------------------------------------------------------------------------

COLUMNS = (
    "slim cost: bytes / measured",
    "agreement: asked / teacher-forced",
    "acceptance: drafts at full, at slim, slim at full",
    "plain tok/s",
    "best drafts (of what is promised)",
    "best tier (of what is promised)",
    "auto",
    "tier / best without",
    "at mean pass times",
    "auto / best without",
    "at mean pass times",
    "optimum",
    "auto / optimum",
    "at mean pass times",
    "auto / optimum of its own texts",
    "time in the tier",
    "side",
    "learning / auto",
    "plans (drafts x rounds)",
    "4-grams that stood before, in texts of plain decoding, with tier, of auto",
)
HEADER = (f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS))


def row(found: dict[str, Any]) -> str:
    """One cell of the dial."""
    best = best_without_tier(found)
    times, shares = found["milliseconds"], found["acceptance"]
    # Under the paper's rule a slim token is not refused but escalates, or is kept.
    kept = shares["accept_window" if found["case"]["mode"] == "lossless" else "kept_rate"]
    cells = [
        f"{found['cost']} / {times['slim'] / times['full']:.2f}",
        f"{found['asked']} / {found['agreement']:.2f}",
        f"{shares['accept_full']:.2f}, {shares['accept_slim']:.2f}, {kept:.2f}",
        f"{rate(found, 'plain'):.1f}",
    ]
    for name in ("speculative", "tier"):
        cells.append(f"{rate(found, name):.1f} ({rate(found, name) / found['promised'][name]:.2f})")
    cells += [f"{rate(found, 'auto'):.1f}"]
    cells += [
        ratio(found, name, best, at_means)
        for name in ("tier", "auto")
        for at_means in (False, True)
    ]
    cells += [f"{found['optimum']:.1f}"]
    cells += [f"{of(found, 'auto') / found['optimum']:.3f}" for of in (rate, rate_at_means)]
    cells += [f"{at_hand(found):.3f}"]
    cells += [f"{tier_share(found):.0%}", side(found), learning(found)]
    cells += [", ".join(f"{drafts}x{rounds}" for drafts, rounds in found["plans"].values())]
    cells += [", ".join(f"{copied_share(found, name):.2f}" for name in ("plain", "tier", "auto"))]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    from transformers import AutoModelForCausalLM

    args = parse()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    texts = {
        path.name: read_prompts(path, str(args.base), args.longest_prompt, args.chat)
        for path in args.prompts
    }
    timed = {name: prompts[:-HELD_OUT] for name, prompts in texts.items()}
    held_out = next(iter(texts.values()))[-HELD_OUT:]
    texts_of_agreement = hashlib.sha256(json.dumps(held_out).encode()).hexdigest()[:8]
    costs = [float(cost) for cost in args.costs.split(",")]
    cases = cases_of(args, texts)
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.bfloat16).eval()
    found = []
    # By agreement first: where passes count for their cost, costs share a target.
    cells = [(cost, float(asked)) for asked in args.agreements.split(",") for cost in costs]
    with tempfile.TemporaryDirectory() as folder:
        for cost, asked in tqdm(cells, desc="cells", disable=None):
            args.pass_times = by_cost(cost, base, args.drafter) if args.by_cost else None
            # Where the clock says what passes cost, the smallest target does for all costs.
            size = max(costs) if args.by_cost else cost
            about = {"target": f"constructed from {args.base.name}", "cost": cost, "asked": asked}
            about |= {"size": size} | about_run(args)
            known = results(args.out, about)
            if all(asdict(case) in [each["case"] for each in known] for case in cases):
                found += [each for each in known if Case(**each["case"]) in cases]
                continue
            name = f"{args.base.name}-{size:g}-{asked:g}-{texts_of_agreement}"
            target = (args.targets or Path(folder)) / name
            about_target = target / "dial.json"
            if not about_target.is_file():
                if args.targets is None:  # one at a time
                    shutil.rmtree(folder)
                construct(target, base, size, asked, held_out)
            made = json.loads(about_target.read_text())
            noted = {"agreement": made["agreement"]}
            cell = measure(str(target), {"mask": made["mask"]}, timed, about, args, noted)
            found += cell
            tqdm.write("\n".join(map(row, cell)), file=sys.stderr)
    found.sort(key=lambda each: (each["cost"], each["asked"]))
    print(", ".join(f"{name} {value}" for name, value in about_run(args).items()))
    print(
        f"targets constructed from {args.base.name}, greedy, {args.dtype}, decode steps only, "
        f"ratios of all runs {SPREAD}"
    )
    for case in dict.fromkeys(tuple(each["case"].values()) for each in found):
        print("", "prompts {}, batch {}, {}".format(*case), "", *HEADER, sep="\n")
        print(*(row(each) for each in found if tuple(each["case"].values()) == case), sep="\n")


if __name__ == "__main__":
    main()
