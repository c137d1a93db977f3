# SPDX-License-Identifier: Apache-2.0
"""The laws of sampled tokens under VIA-SD, against the reference on small vocabularies: the
target's own in the lossless mode, and the formula of `tiers.paper_law` in the paper's.
"""

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chi_square import SIGNIFICANCE, chi_square
from transformers import PreTrainedModel
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from trace_engine import Arrival
from via_sd_engine import (
    ViaSDEngine,
    check_greedy_tokens,
    logits_of,
    looked_up,
    slim_logits,
    slim_logits_of_all,
)

from tiny_models import make_dense, save_character_tokenizer
from vllm_nvium.model_executor.ops.tiers import ACCEPT, ESCALATE, REGENERATE, paper_law, paper_tiers

VOCABULARY = 8
SKIPPED = (1, 2)
# Repeats itself, and every token of the vocabulary is in it: n-grams always have a draft.
PROMPT = [3, 4, 5, 6, 7, 2, 1, 0, 3, 4, 6, 5, 3, 4, 5]
SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "initializer_range": 0.12}
REQUESTS = 2500
KINDS = ["ngram", "greedy draft model", "drawing draft model"]
TOKENS = 4


@dataclass
class Served:
    reference: PreTrainedModel
    draft: PreTrainedModel
    kind: str
    engine: ViaSDEngine

    def proposal(self, prefix: list[int], temperature: float) -> torch.Tensor | None:
        """[V] float64, the law of the first draft behind a prefix; None where there is none."""
        if self.kind == "ngram":
            drafts = looked_up(prefix, 1, longest=2)
            return one_hot(drafts[0]) if drafts else None
        logits = logits_of(self.draft, prefix)[-1].double()
        if self.kind == "drawing draft model":
            return torch.softmax(logits / temperature, dim=-1)
        return one_hot(int(logits.argmax()))


def one_hot(token: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(token), VOCABULARY).double()


@pytest.fixture(scope="module", params=KINDS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder: Path = tmp_path_factory.mktemp("laws")
    reference = make_dense(folder / "target", seed=3, **SIZES)
    draft = make_dense(folder / "draft", seed=4, num_hidden_layers=2, **SIZES)
    drafter: dict[str, Any] = {
        "method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2,
        "prompt_lookup_min": 1,
    }  # fmt: skip
    if request.param != "ngram":
        how = "greedy" if request.param.startswith("greedy") else "probabilistic"
        drafter = {
            "method": "draft_model", "model": str(folder / "draft"), "num_speculative_tokens": 2,
            "draft_sample_method": how,
        }  # fmt: skip
    engine = ViaSDEngine(
        str(folder / "target"),
        drafter,
        {"mask": ",".join(map(str, SKIPPED)), "window": 6, "allow_paper_mode": True},
        max_num_seqs=256,
        max_num_batched_tokens=4096,
        num_gpu_blocks_override=600,
        max_model_len=64,
    )
    return Served(reference, draft, request.param, engine)


def draw_tokens(served: Served, requests: Sequence[SamplingParams]) -> list[list[int]]:
    torch.manual_seed(0)  # what drafters draw from, and the slim verifier under the paper's rule
    served.engine.runner.seeds.manual_seed(1)
    served.engine.run([Arrival(0, list(PROMPT), params) for params in requests])
    return [served.engine.emitted[str(i)].tokens for i in range(len(requests))]


def laws_behind(
    model: PreTrainedModel, prefixes: Sequence[Sequence[int]], temperature: float
) -> torch.Tensor:
    """[P, V] float64."""
    with torch.no_grad():
        tokens = torch.tensor([[*PROMPT, *prefix] for prefix in prefixes])
        return torch.softmax(model(tokens).logits[:, -1].double() / temperature, dim=-1)


def joint_law(model: PreTrainedModel, length: int, temperature: float) -> np.ndarray:
    """[V] * length, of the first tokens."""
    law = laws_behind(model, [()], temperature)[0]
    for done in range(1, length):
        prefixes = list(itertools.product(range(VOCABULARY), repeat=done))
        law = (law.reshape(-1, 1) * laws_behind(model, prefixes, temperature)).reshape(-1)
    return law.reshape((VOCABULARY,) * length).numpy()


def counts_of(tokens: Sequence[Sequence[int]], places: Sequence[int]) -> np.ndarray:
    counts = np.zeros((VOCABULARY,) * len(places))
    for row in tokens:
        counts[tuple(row[place] for place in places)] += 1
    return counts


def check_joint(tokens: Sequence[Sequence[int]], law: np.ndarray) -> None:
    """Marginals of one, two and three places: every one has bins that are full enough."""
    for places in [(0,), (1,), (2,), (3,), (0, 1), (1, 2), (2, 3), (1, 3), (0, 1, 2), (1, 2, 3)]:
        others = tuple(i for i in range(TOKENS) if i not in places)
        counts, due = counts_of(tokens, places), law.sum(axis=others)
        p_value = chi_square([counts.ravel()], [due.ravel()])
        assert p_value > SIGNIFICANCE, (places, p_value)


# --- lossless -------------------------------------------------------------------------------------


def make_constant(path: Path, law: torch.Tensor) -> None:
    """Write a Llama checkpoint whose next token has the same law [V] behind every text."""
    model = make_dense(path, seed=4, num_hidden_layers=1, whisper=0.0, vocab_size=len(law))
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(torch.eye(1, model.config.hidden_size))
        state = model.model(torch.tensor([[5]])).last_hidden_state[0, 0]
        unembedding = law.log()[:, None] * state / state.square().sum()
        model.get_output_embeddings().weight.copy_(unembedding)
    model.save_pretrained(path)


@pytest.mark.parametrize("rounds", [0, 1])
def test_drawn_drafts_that_a_grammar_cuts(rounds: int, tmp_path: Path) -> None:
    """The grammar forbids most of what the drafter may draw, and cuts it before it is verified. No
    draft may tell anything of the noise that the full model draws with."""
    sizes = {"vocab_size": 98, "initializer_range": 0.12}
    reference = make_dense(tmp_path / "target", seed=3, **sizes)
    letters = [3 + ord(letter) - 32 for letter in "abc"]
    # Half of what it draws is a `d`, which the grammar cuts, and nearly all of the rest an `a`.
    wanted = torch.full((98,), 1e-4)
    wanted[[*letters, letters[-1] + 1]] = torch.tensor([0.44, 0.03, 0.03, 0.5])
    make_constant(tmp_path / "draft", wanted)
    for name in ("target", "draft"):
        save_character_tokenizer(tmp_path / name)
    drafter: dict[str, Any] = {
        "method": "draft_model", "model": str(tmp_path / "draft"), "num_speculative_tokens": 2,
        "draft_sample_method": "probabilistic",
    }  # fmt: skip
    engine = ViaSDEngine(
        str(tmp_path / "target"),
        drafter,
        {"mask": "1,2", "window": 4, "rounds": rounds},
        max_num_seqs=128,
        max_num_batched_tokens=4096,
        num_gpu_blocks_override=300,
        max_model_len=64,
    )
    grammar = StructuredOutputsParams(regex="[abc]{3}")
    prompt, count = [40, 50, 60, 40, 50], 2000
    torch.manual_seed(0)
    params = [
        SamplingParams(temperature=1.0, max_tokens=3, structured_outputs=grammar)
        for _ in range(count)
    ]
    engine.run([Arrival(0, list(prompt), each) for each in params])
    tokens = [engine.emitted[str(i)].tokens for i in range(count)]

    def law(prefix: list[int]) -> torch.Tensor:
        logits = logits_of(reference, prompt + prefix)[-1].double()
        return torch.softmax(logits[letters], dim=-1)

    first = law([])
    due = torch.stack([first[i] * law([token]) for i, token in enumerate(letters)])
    counts = np.zeros((3, 3))
    for row in tokens:
        counts[letters.index(row[0]), letters.index(row[1])] += 1
    p_value = chi_square([counts.ravel()], [due.numpy().ravel()])
    assert p_value > SIGNIFICANCE, (counts / count, due)


def sampled(temperature: float, **fields: Any) -> SamplingParams:
    # More tokens than are looked at, so that windows are not cut short.
    fields = {"max_tokens": TOKENS + 3, "ignore_eos": True} | fields
    return SamplingParams(temperature=temperature, **fields)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("rounds", [1, 2])
def test_lossless_tokens_follow_the_targets_law(
    served: Served, temperature: float, rounds: int
) -> None:
    served.engine.set_rounds(2, rounds)
    served.engine.window_rounds.clear()
    counts = served.engine.runner.session.counts
    before = counts.accepted, counts.window_tokens, counts.slim_accepted, counts.slim_drafted
    tokens = draw_tokens(served, [sampled(temperature)] * REQUESTS)
    check_joint(tokens, joint_law(served.reference, TOKENS, temperature))
    after = counts.accepted, counts.window_tokens, counts.slim_accepted, counts.slim_drafted
    kept, seen, slim_kept, slim_seen = (b - a for a, b in zip(before, after, strict=True))
    # Both tiers kept and rejected tokens often (a draft is seldom what a draw would be).
    assert 0.2 < kept / seen < 0.95 and 0.02 < slim_kept / slim_seen < 0.9
    assert max(served.engine.window_rounds) == rounds


@pytest.mark.parametrize(
    "fields", [{"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.3}], ids=lambda fields: next(iter(fields))
)
def test_lossless_tokens_follow_the_law_that_cuts_leave(
    served: Served, fields: dict[str, Any]
) -> None:
    served.engine.set_rounds(2, 2)
    tokens = draw_tokens(served, [sampled(1.0, **fields)] * REQUESTS)
    for length in range(2):
        observed, expected = [], []
        for prefix in itertools.product(range(VOCABULARY), repeat=length):
            rows = [row for row in tokens if tuple(row[:length]) == prefix]
            if len(rows) < 100:
                continue
            law = cut(laws_behind(served.reference, [prefix], 1.0)[0], **fields)
            counts = counts_of(rows, [length])
            assert counts[law == 0].sum() == 0
            observed.append(counts[law > 0])
            expected.append(law[law > 0])
        assert observed and chi_square(observed, expected) > SIGNIFICANCE


def cut(law: torch.Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> np.ndarray:
    """The most likely tokens: as many as asked for, or until their sum reaches `top_p`, or those
    that are not less likely than `min_p` of the first."""
    order = law.argsort(descending=True)
    sums = law[order].cumsum(0)
    count = top_k or int((sums < top_p).sum()) + 1
    if min_p:
        count = int((law >= min_p * law.max()).sum())
    kept = torch.zeros_like(law)
    kept[order[:count]] = law[order[:count]]
    return (kept / kept.sum()).numpy()


# --- the paper's rule -----------------------------------------------------------------------------

ACCEPT_FROM, ESCALATE_BELOW = 0.6, 0.25
PAPER = {
    "via_sd_mode": "paper", "via_sd_accept": ACCEPT_FROM, "via_sd_escalate": ESCALATE_BELOW
}  # fmt: skip


def tiers_of(slim: torch.Tensor) -> torch.Tensor:
    """[V], the tier of every token under the slim law [V]."""
    shares, thresholds = (slim / slim.max())[None], (ACCEPT_FROM, ESCALATE_BELOW)
    return paper_tiers(shares, *(torch.tensor([each]) for each in thresholds))[0]


@dataclass(frozen=True)
class Place:
    """Where the next token stands under the paper's rule.

    Attributes:
        opened: tokens behind the prompt when its window was opened; the last of them is the one
            whose K/V no pass of the full model has written.
        rounds: of the window so far.
        drafts: of the present round that are still to come; n-grams are known by then.
        known: those n-grams.
        has_escalated: a token of this round was left to the full model.
    """

    opened: int
    rounds: int = 0
    drafts: int = 0
    known: tuple[int, ...] = ()
    has_escalated: bool = False


class PapersLaw:
    """The joint law of the first tokens under the paper's rule: its formula for one position,
    composed over drafts, rounds, and windows."""

    def __init__(self, served: Served, temperature: float, drafts: int, rounds: int) -> None:
        self.served, self.drafts, self.rounds = served, drafts, rounds
        self.full: dict[tuple[int, ...], torch.Tensor] = {}
        self.draft: dict[tuple[int, ...], torch.Tensor] = {}
        self.slim: dict[tuple[tuple[int, ...], int], torch.Tensor] = {}
        for length in range(TOKENS):
            prefixes = list(itertools.product(range(VOCABULARY), repeat=length))
            laws = laws_behind(served.reference, prefixes, temperature)
            self.full |= dict(zip(prefixes, laws, strict=True))
            laws = laws_behind(served.draft, prefixes, temperature)
            if served.kind == "greedy draft model":
                laws = torch.nn.functional.one_hot(laws.argmax(dim=1), VOCABULARY).double()
            self.draft |= dict(zip(prefixes, laws, strict=True))
            for opened in range(1, length + 1):
                logits = slim_logits_of_all(
                    served.reference, SKIPPED,
                    [[*PROMPT, *prefix[: opened - 1]] for prefix in prefixes],
                    [prefix[opened - 1 :] for prefix in prefixes],
                )[:, -1]  # fmt: skip
                laws = torch.softmax(logits.double() / temperature, dim=-1)
                self.slim |= {
                    (prefix, opened): law for prefix, law in zip(prefixes, laws, strict=True)
                }

    def joint(self) -> np.ndarray:
        """[V] * TOKENS."""
        # The first token is the full model's, behind the prompt.
        first = self.full[()].tolist()
        weights = {((token,), Place(1)): weight for token, weight in enumerate(first)}
        for _ in range(1, TOKENS):
            longer: dict[tuple[tuple[int, ...], Place], float] = {}
            for (prefix, place), weight in weights.items():
                for token, share, behind in self.moves(prefix, place):
                    key = (*prefix, token), behind
                    longer[key] = longer.get(key, 0.0) + weight * share
            weights = longer
        law = np.zeros((VOCABULARY,) * TOKENS)
        for (tokens, _), weight in weights.items():
            law[tokens] += weight
        return law

    def moves(self, prefix: tuple[int, ...], place: Place) -> list[tuple[int, float, Place]]:
        """The next token: each way to get it with its probability, and where it leads to."""
        if not place.drafts and place.rounds < self.rounds and not place.has_escalated:
            known: list[int] = []
            if self.served.kind == "ngram":
                known = looked_up([*PROMPT, *prefix], self.drafts, longest=2)
            drafts = len(known) if self.served.kind == "ngram" else self.drafts
            place = Place(place.opened, place.rounds + 1, drafts, tuple(known))
        q, anew = self.full[prefix], Place(len(prefix) + 1)
        if not place.drafts:
            return [(token, share, anew) for token, share in enumerate(q.tolist()) if share]
        p, slim = self.draft[prefix], self.slim[prefix, place.opened]
        if self.served.kind == "ngram":
            p = one_hot(place.known[0])
        tiers = tiers_of(slim)
        left, known_left = place.drafts - 1, place.known[1:]
        kept = replace(place, drafts=left, known=known_left)
        asked = replace(kept, has_escalated=True)
        drawn_again = replace(place, drafts=0, known=())
        a, b, c = (tiers == tier for tier in (ACCEPT, REGENERATE, ESCALATE))
        # The full model's own draw, and whether the draft happens to be equal to it.
        agreed = torch.where(c, p * q, 0.0)
        refused = p[c].sum() * q - agreed
        shares = [(p * a, kept), (p[b].sum() * slim, drawn_again), (agreed, asked), (refused, anew)]
        one_position = paper_law(p, slim, q, ACCEPT_FROM, ESCALATE_BELOW)
        torch.testing.assert_close(sum(share for share, _ in shares), one_position)
        return [
            (token, share, behind)
            for law, behind in shares
            for token, share in enumerate(law.tolist())
            if share > 0
        ]


def check_papers_law(
    served: Served, tokens: Sequence[list[int]], temperature: float, drafts: int, rounds: int
) -> None:
    law = PapersLaw(served, temperature, drafts, rounds).joint()
    assert law.sum() == pytest.approx(1.0)
    counts = counts_of(tokens, range(TOKENS))
    assert counts[law == 0].sum() == 0
    check_joint(tokens, law)
    # It is another law than the target's, and these are enough draws to tell; but most drafts of
    # the greedy draft model escalate, and what escalates follows the target.
    if served.kind != "greedy draft model":
        plain = joint_law(served.reference, 3, temperature).sum(axis=0)
        assert chi_square([counts_of(tokens, (1, 2)).ravel()], [plain.ravel()]) < SIGNIFICANCE


@pytest.mark.parametrize(
    ("drafts", "rounds", "temperature"),
    [(2, 1, 1.0), (2, 2, 1.0), (2, 2, 0.7), (1, 3, 1.0)],
)
def test_tokens_of_the_papers_rule_follow_its_formula(
    served: Served, drafts: int, rounds: int, temperature: float
) -> None:
    served.engine.set_rounds(drafts, rounds)
    served.engine.window_rounds.clear()
    tiers = list(served.engine.runner.session.counts.tiers)
    tokens = draw_tokens(served, [sampled(temperature, extra_args=PAPER)] * REQUESTS)
    check_papers_law(served, tokens, temperature, drafts, rounds)
    happened = [
        b - a for a, b in zip(tiers, served.engine.runner.session.counts.tiers, strict=True)
    ]
    assert all(count > 100 for count in happened), happened
    assert max(served.engine.window_rounds) == rounds


def test_the_papers_rule_at_temperature_0(served: Served) -> None:
    """By hand: keep the draft, take the slim verifier's token, or the target's."""
    if served.kind == "drawing draft model":
        pytest.skip("at temperature 0 it drafts as the greedy one does")
    served.engine.set_rounds(1, 1)
    generator = np.random.default_rng(0)
    prompts = [generator.integers(0, VOCABULARY, 12).tolist() for _ in range(60)]
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, extra_args=PAPER)
    served.engine.run([Arrival(0, list(prompt), params) for prompt in prompts])
    seen = [0, 0, 0]
    for number, prompt in enumerate(prompts):
        first, second = served.engine.emitted[str(number)].tokens[:2]
        p = served.proposal([*prompt, first], 1.0)
        if p is None:
            continue
        draft = p.argmax()
        slim = slim_logits(served.reference, SKIPPED, prompt, [first])[-1:].softmax(dim=-1)
        tier = int(tiers_of(slim[0])[draft])
        seen[tier] += 1
        wanted = {
            ACCEPT: int(draft),
            REGENERATE: int(slim.argmax()),
            ESCALATE: int(logits_of(served.reference, [*prompt, first])[-1].argmax()),
        }
        assert second == wanted[tier], (number, tier)
    assert min(seen) > 2, seen


# --- requests of all kinds in one batch -----------------------------------------------------------


def test_requests_of_all_kinds_keep_their_laws_beside_each_other(served: Served) -> None:
    served.engine.set_rounds(2, 2)
    each = 1500
    kinds = {
        "lossless": [sampled(1.0)] * each,
        "paper": [sampled(1.0, extra_args=PAPER)] * each,
        "off": [sampled(1.0, extra_args={"via_sd": "off"})] * each,
        "seeded": [sampled(1.0, seed=seed) for seed in range(each)],
        "greedy": [sampled(0.0)] * (each // 10),
    }
    order = [(kind, params) for kind, all_ in kinds.items() for params in all_]
    np.random.default_rng(0).shuffle(order)
    tokens = draw_tokens(served, [params for _, params in order])
    law = joint_law(served.reference, TOKENS, 1.0)
    by_kind = {
        kind: [row for row, (its, _) in zip(tokens, order, strict=True) if its == kind]
        for kind in kinds
    }
    for kind in ("lossless", "off", "seeded"):
        check_joint(by_kind[kind], law)
    check_papers_law(served, by_kind["paper"], 1.0, drafts=2, rounds=2)
    assert len(set(map(tuple, by_kind["greedy"]))) == 1
    check_greedy_tokens(served.reference, PROMPT, by_kind["greedy"][0])
