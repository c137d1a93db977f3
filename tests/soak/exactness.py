# SPDX-License-Identifier: Apache-2.0
"""Random crowds of requests against the reference model for as long as it is asked to: both laws,
shared prefixes, equal requests, scored prompts, preemption by two policies, aborts, emptied prefix
caches and chunks down to one token. `make soak-exactness` runs it; the first difference ends it.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from tqdm import tqdm
from trace_engine import Arrival, TraceEngine, reference_logits
from vllm import SamplingParams

from tiny_models import make_nvium

VOCABULARY, TOLERANCE = 256, 3e-4
# Differences below which a decision may fall either way: float32 of two implementations.
CLOSE = 2e-3
TEXTS = [[random.Random(t).randrange(3, VOCABULARY) for _ in range(120)] for t in range(3)]


@dataclass
class Drawn:
    """How the token behind a position was drawn."""

    mixture: bool
    thresholds: np.ndarray
    exit: int


@dataclass
class Counts:
    tokens: int = 0
    requests: int = 0
    prompt_rows: int = 0
    close: int = 0
    seen: dict[str, int] = field(default_factory=dict)


class SoakEngine(TraceEngine):
    """Also notes how each token was drawn, by request and position."""

    def __init__(self, model: str, **overrides: Any) -> None:
        super().__init__(model, **overrides)
        self.drawn: dict[tuple[str, int], Drawn] = {}

    def _record(self, logits: torch.Tensor) -> None:
        step = self._step
        for row, request_id in enumerate(step.request_ids):
            if self._is_for_prompt_logprobs(row, request_id):
                continue
            name = request_id.rsplit("-", 1)[0]
            self.drawn[name, int(step.batch.last[row])] = Drawn(
                bool(step.sampling.mixture[row]),
                step.sampling.thresholds[row].copy(),
                int(step.exits[row]),
            )
        super()._record(logits)


def crowd(g: random.Random, size: int, with_top_k: bool) -> list[Arrival]:
    trace: list[Arrival] = []
    for number in range(size):
        fields: dict[str, Any] = {
            "temperature": g.choice([0.0, 0.7, 1.0, 1.0]),
            "seed": g.randrange(4),
            "max_tokens": g.choice([1, 3, 8, 30, 60, 100, 140]),
            "ignore_eos": True,
            "extra_args": {
                key: value
                for key, value in {
                    "nvium_sampling": g.choice(["routed", "mixture"]),
                    "nvium_max_deferred": g.choice([None, None, 0, 3, 40]),
                }.items()
                if value is not None
            },
        }
        if g.random() < 0.15:
            fields["prompt_logprobs"] = g.choice([0, 2])
        if g.random() < 0.15:
            fields["logprobs"] = g.choice([0, 3])
        if g.random() < 0.2:
            fields["skip_reading_prefix_cache"] = True
        if with_top_k and g.random() < 0.3:
            fields["top_k"] = 1
        prompt = g.choice(TEXTS)[: g.randint(1, 110)] + [
            g.randrange(3, VOCABULARY) for _ in range(g.randrange(3))
        ]
        arrival = Arrival(
            step=g.randrange(40),
            prompt=prompt,
            params=SamplingParams(**fields),
            abort_after=g.choice([None, None, None, None, 1, 5, 20]),
            priority=g.randrange(3),
        )
        if number and g.random() < 0.5:
            other = g.randrange(number)
            if trace[other].continues is None and g.random() < 0.7:
                arrival.continues = other
                arrival.step = trace[other].step + g.randint(5, 90)
                arrival.prompt = [g.randrange(3, VOCABULARY) for _ in range(g.randrange(3))]
                arrival.take = g.choice([32, 64, 96, 128, 180])
                arrival.params.max_tokens = min(arrival.params.max_tokens or 1, 60)  # fits
            else:
                arrival.prompt, arrival.continues = (
                    list(trace[other].prompt),
                    trace[other].continues,
                )
                arrival.take, arrival.step = trace[other].take, max(arrival.step, trace[other].step)
                if arrival.continues is not None:
                    arrival.params.max_tokens = min(arrival.params.max_tokens or 1, 60)
        trace.append(arrival)
    return trace


def check(reference: Any, engine: SoakEngine, name: str, arrival: Arrival, counts: Counts) -> None:
    seen = engine.emitted.get(name)
    if seen is None or not seen.tokens:
        assert arrival.abort_after is not None, "no tokens"
        return
    if arrival.abort_after is None:
        assert len(seen.tokens) == arrival.params.max_tokens, "too few tokens"
    output, heads = reference_logits(reference, arrival.prompt + seen.tokens)
    law, margins = output.logits[0], output.margins[0].double().numpy()
    counts.requests += 1
    for i, token in enumerate(seen.tokens):
        position = len(arrival.prompt) - 1 + i
        logits, drawn = seen.logits[position], engine.drawn[name, position]
        where = f"request {name}, position {position}, {drawn}"
        if drawn.mixture and logits.isinf().any():  # settled before the last head
            assert law[position].max() - law[position, token] < CLOSE, where
        elif drawn.mixture:
            gap = (torch.log_softmax(logits, -1) - law[position]).abs().max()
            assert gap < TOLERANCE, f"{where}: the law differs by {gap}"
        else:
            check_exit(margins[position], drawn, where, counts)
            gap = (logits - heads[position, drawn.exit]).abs().max()
            assert gap < TOLERANCE, f"{where}: logits differ by {gap}"
        counts.tokens += 1
    prompt = engine.outputs[name].prompt_logprobs
    for i, entry in enumerate((prompt or [])[1:]):
        for token, value in entry.items():
            assert abs(value.logprob - float(law[i, token])) < TOLERANCE, f"{name}: prompt row {i}"
        counts.prompt_rows += 1


def check_exit(margins: np.ndarray, drawn: Drawn, where: str, counts: Counts) -> None:
    lead = margins - drawn.thresholds
    leaves = np.flatnonzero(lead > 0)
    expected = int(leaves[0]) if len(leaves) else len(lead)
    if expected != drawn.exit:
        first = min(expected, drawn.exit)
        assert abs(lead[first]) < CLOSE, f"{where}: exit {expected} was due, leads {lead}"
        counts.close += 1


def make_engine(path: str, g: random.Random, v2: bool, large: bool) -> tuple[SoakEngine, str]:
    fields: dict[str, Any] = {
        "block_size": g.choice([32, 32, 64]),
        "num_gpu_blocks_override": g.choice([9, 12, 30, 90, 140]),
        "max_num_batched_tokens": g.choice([16, 48, 200, 400]),
        "scheduling_policy": g.choice(["fcfs", "priority"]),
        "max_num_seqs": g.choice([3, 6, 12, 24, 32]),
    }
    fields["max_num_batched_tokens"] = max(fields["max_num_batched_tokens"], fields["max_num_seqs"])
    if large:
        fields |= {"num_gpu_blocks_override": g.choice([90, 140]), "max_num_batched_tokens": 400}
        fields["max_num_seqs"] = g.choice([12, 24, 32])
    if v2:
        fields["max_num_seqs"] = 6
    return SoakEngine(path, **fields), str(fields)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1_000_000, help="generated tokens to check")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--large",
        action="store_true",
        help="only engines with room for many requests: more tokens an hour, fewer preemptions",
    )
    parser.add_argument("--v2", action="store_true", help="Model Runner V2 is used, interpreted")
    args = parser.parse_args()
    start, counts = time.time(), Counts()
    folder = tempfile.mkdtemp()
    reference = make_nvium(folder, exit_layers=[1, 2, 3], seed=1)
    progress = tqdm(total=args.tokens, unit="tok", mininterval=5)
    round_ = 0
    while counts.tokens < args.tokens:
        g = random.Random(f"{args.seed}.{round_}")
        engine, shown = make_engine(folder, g, args.v2, args.large)
        for number in range(6 if args.v2 else 40):
            where = f"seed {args.seed}.{round_}, crowd {number}, {shown}"
            play(reference, engine, g, counts, args.large, where)
            progress.update(counts.tokens - progress.n)
            if counts.tokens >= args.tokens:
                break
        for name in ("preemptions", "catch_up_passes", "unfinished_hits", "rising_marks"):
            counts.seen[name] = counts.seen.get(name, 0) + getattr(engine, name)
        round_ += 1
        del engine
    progress.close()
    sys.stdout.write(
        f"no difference: {counts.tokens} tokens of {counts.requests} requests, "
        f"{counts.prompt_rows} prompt rows, {round_} engines, {counts.seen}, exits too close to "
        f"call {counts.close}, seed {args.seed}, {(time.time() - start) / 3600:.2f} hours\n"
    )


def play(
    reference: Any, engine: SoakEngine, g: random.Random, counts: Counts, large: bool, shown: str
) -> None:
    config = engine.scheduler.scheduler_config
    config.long_prefill_token_threshold = 0 if large else g.choice([0, 0, 0, 0, 1, 7])
    resets = tuple(g.sample(range(5, 80), 2)) if g.random() < 0.2 else ()
    # Small crowds meet every state; large ones give the tokens.
    size = g.randint(2, 14) if g.random() < 0.4 else g.randint(20, 60)
    if large:
        size = g.randint(150, 300)
    trace = crowd(g, size, with_top_k=not os.environ.get("TRITON_INTERPRET"))
    engine.drawn.clear()
    try:
        with nullcontext() if g.random() < 0.5 else engine.without_bounds():
            engine.run(trace, max_steps=40_000, resets=resets)
        for number, arrival in enumerate(trace):
            check(reference, engine, str(number), arrival, counts)
    except BaseException:
        sys.stdout.write(f"\nfailed at {shown}\n")
        raise


if __name__ == "__main__":
    main()
