# SPDX-License-Identifier: Apache-2.0
"""`auto` of VIA-SD on recorded texts of real models: the target's answers, and the tokens that its
slim verifier and a draft model predict at each position. Plans are replayed on them with given pass
times, so that a change of the planner is judged in a minute and on more prompts than can be timed.

    python benchmarks/via_sd_replay.py record TARGET --mask even:0.2 --prompts humaneval.jsonl \\
        --out texts.json
    python benchmarks/via_sd_replay.py judge texts.json --full 23.1 --slim 17.8

`record --dial .55:.9` takes a constructed target of `via_sd_dial.py` instead, whose texts serve
all costs. Greedy and lossless. Behind a token that the full model will reject nothing was recorded:
there the slim verifier accepts drafts as often as elsewhere, and only the time of rounds counts.
"""

import argparse
import json
import os
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import exp
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))

from measured import drafter_config, read_prompts
from via_sd_plans import CLEAR

from vllm_nvium.via_sd.planner.choose import Planner
from vllm_nvium.via_sd.planner.fixed import FixedRounds
from vllm_nvium.via_sd.planner.model import LOSSLESS, DraftPlan

# Plans that `auto` is held against.
PLAIN = [DraftPlan(drafts, 0) for drafts in (0, 2, 3, 4, 5, 6)]
TIERED = [
    DraftPlan(drafts, rounds)
    for drafts, rounds in ((1, 1), (2, 1), (4, 1), (6, 1), (2, 2), (4, 2), (6, 2), (4, 4), (6, 8))
]
# Of pass times: relative noise, and the chance of one that is five times too long.
NOISE, OUTLIERS = 0.04, 0.005
# What a row adds to a pass, in passes; seconds of a step beside its passes, and of a search for
# n-grams.
ROW, OVERHEAD, LOOKUP = 0.004, 0.003, 1e-4
# Passes after which the machine's speed has mostly changed.
SPEED_MEMORY = 100
# Batches to learn on before the count starts, batches that count, repeats with other orders.
STARTS = {"at the start": (0, 5, 8), "later": (4, 16, 4)}


@dataclass(frozen=True)
class Text:
    """One answer.

    Attributes:
        prompt: token ids.
        tokens: the answer's.
        slim: at each position of both, the token that the slim verifier says stands there, after
            the tokens before, whose K/V are the target's.
        draft: the same of a draft model; None: n-grams draft.
    """

    prompt: list[int]
    tokens: list[int]
    slim: list[int]
    draft: list[int] | None


# --- Recording ------------------------------------------------------------------------------------


def record(args: argparse.Namespace) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from vllm_nvium.model_executor.via_sd.mask import skipped_layers

    def load(folder: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    target, drafter = load(args.target), load(args.drafter) if args.drafter else None
    prompts = read_prompts(args.prompts, str(args.target), args.longest_prompt, args.chat)
    if args.dial:
        from via_sd_dial import HELD_OUT, expanded, extra_layers, set_agreement

        cost, agreement = map(float, args.dial.split(":"))
        base = target
        target, new, noise = expanded(base, extra_layers(base, cost))
        set_agreement(target, noise, base, prompts[-HELD_OUT:], agreement)
        skipped = set(new)
    else:
        skipped = set(skipped_layers(args.mask, target.config.num_hidden_layers))
    texts = []
    with torch.inference_mode():
        for prompt in tqdm(prompts[: args.texts], desc="texts", disable=None):
            ids = target.generate(
                torch.tensor([prompt]),
                max_new_tokens=args.new_tokens,
                min_new_tokens=args.new_tokens,
                do_sample=False,
            )[0]
            draft = None
            if drafter is not None:
                draft = [-1, *drafter(ids[None]).logits[0, :-1].argmax(-1).tolist()]
            slim = [-1, *slim_tokens(target, skipped, ids)[:-1]]
            texts.append(Text(prompt, ids[len(prompt) :].tolist(), slim, draft))
    part = args.out.with_suffix(".part")
    part.write_text(json.dumps([asdict(text) for text in texts]))
    part.replace(args.out)


def slim_tokens(model: Any, skipped: set[int], ids: Any) -> list[int]:
    """What the slim verifier says after each of T tokens: its layers read the K/V that the whole
    model wrote for those before, and their own for the newest.

    Args:
        ids: `[T]` int64.
    """
    import torch
    from transformers import DynamicCache

    cache, count = DynamicCache(), len(ids)
    model(ids[None], past_key_values=cache, use_cache=True)
    places = torch.arange(count)
    never = torch.finfo(model.dtype).min
    mask = torch.full((count, 2 * count), never, dtype=model.dtype)
    mask[:, :count].masked_fill_(places < places[:, None], 0)
    mask[places, count + places] = 0
    inner, layers = model.model, model.model.layers
    inner.layers = torch.nn.ModuleList(layer for i, layer in enumerate(layers) if i not in skipped)
    inner.config.num_hidden_layers = len(inner.layers)
    try:
        logits = model(
            ids[None],
            past_key_values=cache,
            attention_mask=mask[None, None],
            position_ids=places[None],
            use_cache=True,
        ).logits
    finally:
        inner.layers, inner.config.num_hidden_layers = layers, len(layers)
    found: list[int] = logits[0].argmax(-1).tolist()
    return found


# --- Replaying ------------------------------------------------------------------------------------


class Replay:
    """One request after the other. The planner is told what the model runner would tell it.

    Args:
        seconds: of a pass of the full model, of the slim verifier, and of one draft.
        wander: standard deviation of the logarithm of a slowdown that all passes share for some
            time. The planner observes it; the times that count are without it.
    """

    def __init__(
        self,
        texts: list[Text],
        seconds: tuple[float, float, float],
        wander: float,
        window: int,
        seed: int,
    ) -> None:
        self.window, self.wander, self.log_slowdown = window, wander, 0.0
        self.full, self.slim, self.draft = seconds
        self.random = random.Random(seed)
        self.seconds = 0.0
        self.kept = np.mean([rate_of_drafts(text) for text in texts])

    def run(self, planner: Any, text: Text, name: str) -> int:
        """Decodes one answer but its first token; returns how many tokens that were."""
        ids, at = text.prompt + text.tokens, len(text.prompt) + 1
        start = at
        planner.add(name, LOSSLESS, True)
        while at < len(ids):
            plan = planner.plan([name])
            step = self._tiered if plan.rounds else self._plain
            at += 1 + step(planner, plan, text, ids, at, name)
        planner.remove(name)
        return at - start

    def _plain(
        self, planner: Any, plan: DraftPlan, text: Text, ids: list[int], at: int, name: str
    ) -> int:
        drafts = self._drafts(planner, text, ids[:at], ids, plan.num_draft_tokens)
        drafts = drafts[: len(ids) - at - 1]
        accepted = matching(drafts, ids[at:])
        self._full_pass(planner, len(drafts))
        planner.observe_full_check(name, len(drafts), accepted, False, plan.num_draft_tokens)
        return accepted

    def _tiered(
        self, planner: Any, plan: DraftPlan, text: Text, ids: list[int], at: int, name: str
    ) -> int:
        window: list[int] = []
        room, rounds = min(self.window, len(ids) - at - 1), 0
        while room - len(window) > 0:
            asked = min(plan.num_draft_tokens, room - len(window) - 1)
            drafts = self._drafts(planner, text, ids[:at] + window, ids, asked)
            if not drafts:
                planner.observe_slim_check(name, asked, 0, 0, is_first_round=rounds == 0)
                break
            planner.observe_slim_pass(1 + len(drafts), self._timed(self.slim, 1 + len(drafts)))
            kept = 0
            while kept < len(drafts) and drafts[kept] == self._slim(
                text, ids, at, window, drafts[kept]
            ):
                window.append(drafts[kept])
                kept += 1
            window.append(self._slim(text, ids, at, window, None))
            planner.observe_slim_check(name, asked, len(drafts), kept, 0, rounds == 0)
            rounds += 1
            if not planner.another_round([len(window)], rounds, [name]):
                break
        accepted = matching(window, ids[at:])
        self._full_pass(planner, len(window))
        planner.observe_full_check(name, len(window), accepted, rounds > 0)
        return accepted

    def _slim(
        self, text: Text, ids: list[int], at: int, window: list[int], draft: int | None
    ) -> int:
        """What the slim verifier says behind a window. Where that has left the text: the draft, as
        often as it agrees with drafts elsewhere."""
        place = at + len(window)
        if ids[at:place] == window:
            return text.slim[place]
        return -1 if draft is None or self.random.random() > self.kept else draft

    def _drafts(
        self, planner: Any, text: Text, behind: list[int], ids: list[int], count: int
    ) -> list[int]:
        if count < 1:
            return []
        seconds = self._timed(LOOKUP if text.draft is None else self.draft * count)
        planner.observe_draft_call(1, count, seconds)
        if text.draft is None:
            return looked_up(behind, count)
        # It goes on from its own drafts, which are known as long as they are the text.
        found: list[int] = []
        while len(found) < count and behind == ids[: len(behind)] and len(behind) < len(ids):
            found.append(text.draft[len(behind)])
            behind = [*behind, found[-1]]
        return found + [-2] * (count - len(found))

    def _full_pass(self, planner: Any, drafts: int) -> None:
        planner.observe_full_pass(1 + drafts, self._timed(self.full, 1 + drafts))
        planner.observe_overhead(1, self._timed(OVERHEAD))

    def _timed(self, seconds: float, rows: int = 0) -> float:
        self.seconds += seconds * (1 + ROW * rows)
        noise = max(1 + NOISE * self.random.gauss(0, 1), 0.5)
        if self.wander:
            step = self.wander * (2 / SPEED_MEMORY) ** 0.5
            self.log_slowdown += step * self.random.gauss(0, 1) - self.log_slowdown / SPEED_MEMORY
            noise *= exp(self.log_slowdown)
        return seconds * (1 + ROW * rows) * noise * (5 if self.random.random() < OUTLIERS else 1)


def matching(tokens: Sequence[int], others: Sequence[int]) -> int:
    """Leading tokens that are the same."""
    pairs = enumerate(zip(tokens, others, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(tokens), len(others)))


def looked_up(tokens: list[int], count: int) -> list[int]:
    """What vLLM's n-grams draft, as the other benchmarks set them."""
    from vllm.v1.spec_decode.ngram_proposer import _find_longest_matched_ngram_and_propose_tokens

    config = drafter_config("ngram", count)
    found = _find_longest_matched_ngram_and_propose_tokens(
        origin_tokens=np.array(tokens, dtype=np.int32),
        min_ngram=config["prompt_lookup_min"],
        max_ngram=config["prompt_lookup_max"],
        max_model_len=1 << 20,
        k=count,
    )
    return [int(token) for token in found]


def rate_of_drafts(text: Text) -> float:
    """How often the slim verifier agrees with the draft model; of n-grams, with the text."""
    drafts = text.draft or text.prompt + text.tokens
    pairs = list(zip(drafts, text.slim, strict=True))[len(text.prompt) :]
    return sum(a == b for a, b in pairs) / len(pairs)


# --- The table ------------------------------------------------------------------------------------

HEADER = (
    "| prompts | best drafts | best with the tier, / best drafts | `auto` / best drafts | `auto` / "
    "best of all (range) | steps in the tier | right side |",
    "|" + "---|" * 7,
)


@dataclass(frozen=True)
class Setting:
    """Texts in an order, and times: what plans are compared by.

    Attributes:
        seconds, wander: as `Replay` takes them.
        warm: so many texts are not counted.
    """

    texts: list[Text]
    seconds: tuple[float, float, float]
    wander: float
    window: int
    warm: int
    seed: int

    def rate(self, planner: Any) -> float:
        """Tokens per second."""
        replay = Replay(self.texts, self.seconds, self.wander, self.window, self.seed)
        tokens = 0
        for number, text in enumerate(self.texts):
            if number == self.warm:
                tokens, replay.seconds = 0, 0.0
            tokens += replay.run(planner, text, f"{number}")
        return tokens / replay.seconds

    def best(self, plans: Sequence[DraftPlan]) -> float:
        return max(self.rate(FixedRounds(plan.num_draft_tokens, plan.rounds)) for plan in plans)


def judged(setting: Setting, max_drafts: int) -> tuple[float, float, float, float, float, bool]:
    """Tokens per second of the best drafts, the best with the tier and `auto` as shares of those,
    `auto` as a share of the best of all, its steps in the tier, and whether those are right."""
    plain, tiered = setting.best(PLAIN), setting.best(TIERED)
    planner = Planner(max_drafts, setting.window)
    auto = setting.rate(planner)
    steps = planner.snapshot()["steps"]
    share = steps["tiered"] / sum(steps.values())
    clear = max(plain, tiered) > CLEAR * min(plain, tiered)
    right = not clear or (share > 0.5) == (tiered > plain)
    return plain, tiered / plain, auto / plain, auto / max(plain, tiered), share, right


def judge(args: argparse.Namespace) -> None:
    texts = [Text(**row) for row in json.loads(args.texts.read_text())]
    needed = max(warm + count for warm, count, _ in STARTS.values())
    if len(texts) < needed:
        sys.exit(f"{args.texts} has {len(texts)} texts, and at least {needed} are needed.")
    seconds = (args.full / 1000, args.slim / 1000, args.draft / 1000)
    times = f"full {args.full}, slim {args.slim}, draft {args.draft}, wandering by {args.wander}"
    print(f"{args.texts.name}: {len(texts)} texts; milliseconds: {times}; window {args.window}", "")
    print(*HEADER, sep="\n")
    for name, (warm, count, repeats) in STARTS.items():
        found = []
        for seed in tqdm(range(repeats), desc=name, disable=None, leave=False):
            order = random.Random(seed).sample(texts, warm + count)
            setting = Setting(order, seconds, args.wander, args.window, warm, seed)
            found.append(judged(setting, args.max_drafts))
        means, of_best = np.mean(found, axis=0), [row[3] for row in found]
        cells = [f"{name}: {count} after {warm}, {repeats} orders", f"{means[0]:.1f}"]
        cells += [f"{value:.3f}" for value in means[1:3]]
        cells += [f"{means[3]:.3f} ({min(of_best):.3f}-{max(of_best):.3f})"]
        print("| " + " | ".join([*cells, f"{means[4]:.0%}", f"{means[5]:.0%}"]) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    first = commands.add_parser("record", help="texts of real models")
    first.add_argument("target", type=Path, help="checkpoint (Hugging Face folder)")
    first.add_argument("--mask", default="even:0.2", help="--via-sd-mask")
    first.add_argument("--dial", help="COST:AGREEMENT, construct the target from this one")
    first.add_argument("--drafter", type=Path, help="checkpoint; without it n-grams draft")
    first.add_argument("--prompts", type=Path, required=True, help="JSON lines")
    first.add_argument("--longest-prompt", type=int, default=256, help="leave longer ones out")
    first.add_argument("--chat", action="store_true", help="use the chat template")
    first.add_argument("--texts", type=int, default=24)
    first.add_argument("--new-tokens", type=int, default=128)
    first.add_argument("--out", type=Path, required=True)
    first.set_defaults(do=record)
    second = commands.add_parser("judge", help="the planner on them")
    second.add_argument("texts", type=Path, help="what `record` wrote")
    second.add_argument("--full", type=float, required=True, help="milliseconds of a pass")
    second.add_argument("--slim", type=float, required=True)
    second.add_argument("--draft", type=float, default=0.0, help="of one draft of a draft model")
    second.add_argument(
        "--wander",
        type=float,
        default=0.0,
        help="how much the machine's speed does, .2: by a fifth",
    )
    second.add_argument("--window", type=int, default=16)
    second.add_argument("--max-drafts", type=int, default=6)
    second.set_defaults(do=judge)
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    args.do(args)


if __name__ == "__main__":
    main()
