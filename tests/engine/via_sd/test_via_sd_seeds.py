# SPDX-License-Identifier: Apache-2.0
"""A request with a seed gets from VIA-SD, token by token, what plain vLLM draws with that seed:
whatever was drafted, kept and rejected, beside whatever else, preempted or not.
"""

import os
import random
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from trace_engine import Arrival, TraceEngine
from via_sd_engine import NGRAM, ViaSDEngine

from tiny_models import make_dense
from vllm_nvium.model_executor.via_sd.step import Window
from vllm_nvium.via_sd import row_metadata
from vllm_nvium.via_sd.runner_v1 import seeds_of_generators
from vllm_nvium.via_sd.sampler import draw_slim

VOCABULARY = 64
WINDOW = 12
# Requests of each test that takes many; 200 for a thorough run.
MANY = int(os.environ.get("NVIUM_SEEDED_REQUESTS", "24"))
# Models that agree often, but not always, with themselves without a layer and with each other.
TARGET: dict[str, Any] = {"vocab_size": VOCABULARY, "bigrams": 0.7, "whisper": 0.2}
DRAFT: dict[str, Any] = {
    **TARGET, "num_hidden_layers": 2, "hidden_size": 96, "num_attention_heads": 3,
    "num_key_value_heads": 3, "seed": 5,
}  # fmt: skip
OPTIONS = {"mask": "2", "window": WINDOW, "rounds": 2, "allow_paper_mode": True}
_TEXT = [random.Random(0).randrange(3, VOCABULARY) for _ in range(120)]
# One that repeats itself, for n-grams.
TEXTS = [_TEXT, (_TEXT[:17] * 8)[:120]]
TEMPERATURES = (0.3, 0.7, 1.0, 1.3)
CUTS: list[dict[str, Any]] = [
    {},
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"top_k": 8, "top_p": 0.9, "min_p": 0.02},
    {"presence_penalty": 0.8, "frequency_penalty": 0.4},
    {"repetition_penalty": 1.3, "top_k": 12},
    {"logit_bias": {7: 3.0, 9: -5.0}},
    {"min_tokens": 30, "stop_token_ids": list(range(3, 13))},
    {"allowed_token_ids": list(range(2, 40))},
]


@dataclass
class Engines:
    plain: TraceEngine
    ngram: ViaSDEngine
    draft_model: ViaSDEngine
    # What plain decoding has answered.
    known: dict[str, list[int]] = field(default_factory=dict)

    def tiered(self, drafter: str) -> ViaSDEngine:
        found = getattr(self, drafter.replace(" ", "_"))
        assert isinstance(found, ViaSDEngine)
        return found


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    folder: Path = tmp_path_factory.mktemp("seeds")
    make_dense(folder / "target", seed=1, **TARGET)
    make_dense(folder / "draft", **DRAFT)
    drafter = {"method": "draft_model", "model": str(folder / "draft"), "num_speculative_tokens": 4}
    target = str(folder / "target")
    return Engines(
        # On CPU plain vLLM fails where the prompt of a seeded request is computed in chunks.
        TraceEngine(target, num_gpu_blocks_override=200, max_num_batched_tokens=1024),
        # 10 blocks of 32: a few short sequences fit, so preemption is common.
        ViaSDEngine(target, NGRAM, OPTIONS, num_gpu_blocks_override=10),
        ViaSDEngine(target, drafter, OPTIONS, num_gpu_blocks_override=24, max_num_seqs=12),
    )


def seeded(number: int, **fields: Any) -> SamplingParams:
    cut = CUTS[number % len(CUTS)]
    chosen = {"max_tokens": 40, "ignore_eos": "min_tokens" not in cut} | cut | fields
    temperature = chosen.pop("temperature", TEMPERATURES[number % len(TEMPERATURES)])
    return SamplingParams(temperature=temperature, seed=1000 + number, **chosen)


def requests(count: int, prompt: int = 24, **fields: Any) -> list[Arrival]:
    return [Arrival(0, TEXTS[i % 2][i % 7 :][:prompt], seeded(i, **fields)) for i in range(count)]


def texts(engine: TraceEngine, trace: list[Arrival]) -> list[list[int]]:
    engine.run(trace)
    return [engine.emitted[str(i)].tokens for i in range(len(trace))]


def plain_texts(engines: Engines, trace: list[Arrival]) -> list[list[int]]:
    """Each request alone, from its first step on."""
    for arrival in trace:
        key = str((arrival.prompt, arrival.params))
        if key not in engines.known:
            alone = [Arrival(0, list(arrival.prompt), arrival.params)]
            engines.known[key] = texts(engines.plain, alone)[0]
    return [engines.known[str((arrival.prompt, arrival.params))] for arrival in trace]


def check(engine: TraceEngine, trace: list[Arrival], wanted: list[list[int]]) -> None:
    for number, (mine, theirs) in enumerate(zip(texts(engine, trace), wanted, strict=True)):
        assert mine == theirs, (number, trace[number].params)


class Counted:
    """What both tiers did with drafts meanwhile."""

    def __init__(self, engine: ViaSDEngine) -> None:
        self.counts = engine.runner.session.counts
        self.before = self._now()

    def _now(self) -> tuple[int, int, int, int]:
        counts = self.counts
        return counts.slim_accepted, counts.slim_drafted, counts.accepted, counts.window_tokens

    def __call__(self) -> tuple[int, int, int, int]:
        slim_kept, slim_seen, kept, seen = (
            b - a for a, b in zip(self.before, self._now(), strict=True)
        )
        return slim_kept, slim_seen, kept, seen


DRAFTERS = ["ngram", "draft model"]


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize(
    ("drafts", "rounds", "window"),
    [(4, 2, WINDOW), (1, 1, 2), (3, 3, 7), (4, 0, WINDOW), (4, "auto", WINDOW)],
)
def test_a_seed_draws_what_plain_decoding_draws(
    engines: Engines, drafter: str, drafts: int, rounds: Any, window: int
) -> None:
    engine, trace = engines.tiered(drafter), requests(MANY)
    wanted = plain_texts(engines, trace)
    engine.set_rounds(drafts, rounds, window)
    counted = Counted(engine)
    for start in range(0, len(trace), 8):
        check(engine, trace[start : start + 8], wanted[start : start + 8])
    slim_kept, slim_seen, kept, seen = counted()
    if rounds not in (0, "auto"):
        # Both tiers kept and rejected drafts.
        assert 0 < slim_kept < slim_seen and 0 < kept < seen
    for number in range(0, len(trace), max(len(trace) // 6, 1)):
        check(engine, [trace[number]], [wanted[number]])
    engine.set_rounds(4, 2, WINDOW)


def with_own_noise(draw_slim: Any, batch: Any, windows: list[Window], *args: Any) -> Any:
    """As if the slim verifier did not know what the full model draws with."""
    with patch.object(batch, "generators", {}):
        return draw_slim(*args[:2], batch, args[2], windows, args[3])


def with_noise_of_the_first(draw_slim: Any, batch: Any, windows: list[Window], *args: Any) -> Any:
    """As if later rounds drew with the noise of the first position."""
    for window in windows:
        if window.noise:
            window.noise[len(window.tokens)] = window.noise[0]
    return draw_slim(*args[:2], batch, args[2], windows, args[3])


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("wrong", [with_own_noise, with_noise_of_the_first])
def test_the_slim_verifier_draws_with_the_noise_of_the_full_model(
    engines: Engines, monkeypatch: pytest.MonkeyPatch, drafter: str, wrong: Any
) -> None:
    """Otherwise the full model agrees with it less often, and the text is the same all the same."""
    engine, trace = engines.tiered(drafter), requests(20, temperature=1.0)
    wanted, shares = plain_texts(engines, trace), []
    engine.set_rounds(2, 3, 9)

    def draw(sampler: Any, logits: Any, batch: Any, states: Any, windows: Any, drafts: Any) -> Any:
        return wrong(draw_slim, batch, windows, sampler, logits, states, drafts)

    for _ in range(2):
        counted = Counted(engine)
        check(engine, trace, wanted)
        _, _, kept, seen = counted()
        shares.append(kept / seen)
        monkeypatch.setattr("vllm_nvium.via_sd.runner_v1.draw_slim", draw)
    assert shares[0] > shares[1] + 0.02, shares


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_through_chunks_preemptions_and_cached_prefixes(engines: Engines, drafter: str) -> None:
    engine, generator = engines.tiered(drafter), random.Random(3)
    engine.set_rounds(4, 2, WINDOW)
    preemptions, cached = engine.preemptions, 0
    trace = [
        # Twice each, so that the second one finds the first one's blocks.
        Arrival(3 * i, TEXTS[i // 2 % 2][: 40 + 10 * (i // 2 % 7)], seeded(i, max_tokens=60))
        for i in range(min(MANY, 40))
    ]
    wanted = plain_texts(engines, trace)
    order = list(range(len(trace)))
    for _ in range(2):
        shuffled = [
            Arrival(arrival.step, list(trace[i].prompt), trace[i].params)
            for i, arrival in zip(order, trace, strict=True)
        ]
        check(engine, shuffled, [wanted[i] for i in order])
        cached += sum(engine.outputs[str(i)].num_cached_tokens > 0 for i in range(len(trace)))
        generator.shuffle(order)
    assert cached > 5
    # Beside a draft model vLLM makes requests wait instead.
    assert drafter == "draft model" or engine.preemptions > preemptions + 5


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_beside_requests_of_all_other_kinds(engines: Engines, drafter: str) -> None:
    """Greedy, sampled without a seed, under the paper's rule, without the tier, and aborted."""
    engine = engines.tiered(drafter)
    engine.set_rounds(4, 2, WINDOW)
    paper = {"via_sd_mode": "paper", "via_sd_accept": 0.4, "via_sd_escalate": 0.1}
    others: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 1.0, "extra_args": paper},
        {"temperature": 0.0, "extra_args": paper, "repetition_penalty": 1.2},
        {"temperature": 0.9, "seed": 4, "extra_args": paper},
        {"temperature": 1.0, "seed": 8, "extra_args": {"via_sd": "off"}},
        {"temperature": 0.8, "top_p": 0.7, "logprobs": 3},
        {"temperature": 0.6, "seed": 11, "logprob_token_ids": [5, 6]},
    ]
    mine = requests(min(MANY, 24))
    wanted = plain_texts(engines, mine)
    trace: list[Arrival] = []
    for number, (arrival, fields) in enumerate(
        zip(mine, islice(cycle(others), len(mine)), strict=True)
    ):
        params = SamplingParams(max_tokens=50, ignore_eos=True, **fields)
        abort = 7 if number % 5 == 4 else None
        trace += [
            Arrival(number, list(arrival.prompt), arrival.params),
            Arrival(number, TEXTS[number % 2][:30], params, abort_after=abort),
        ]
    engine.run(trace)
    for number, theirs in enumerate(wanted):
        assert engine.emitted[str(2 * number)].tokens == theirs, mine[number].params
    assert engine.blocks_in_use == 0


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_requests_that_end_inside_a_window(engines: Engines, drafter: str) -> None:
    engine = engines.tiered(drafter)
    engine.set_rounds(4, 2, WINDOW)
    trace = [
        Arrival(0, TEXTS[1][:30], seeded(i, temperature=0.3, max_tokens=1 + i % 20, min_tokens=0))
        for i in range(20)
    ]
    check(engine, trace, plain_texts(engines, trace))
    ends = [
        Arrival(0, TEXTS[i % 2][:30], SamplingParams(
            temperature=1.0, seed=i, max_tokens=50, stop_token_ids=[2, 4, 29, 34, 51]
        ))
        for i in range(12)
    ]  # fmt: skip
    wanted = plain_texts(engines, ends)
    assert len(set(map(len, wanted))) > 4
    check(engine, ends, wanted)


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_beside_requests_that_name_many_tokens(
    engines: Engines, drafter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those have no drafts, because long lists would be made anew for each row of a window."""
    monkeypatch.setattr(row_metadata, "MOST_ENTRIES", 8)
    engine, trace = engines.tiered(drafter), requests(16)
    many = [arrival for arrival in trace if arrival.params.stop_token_ids]
    assert 0 < len(many) < len(trace)
    wanted = plain_texts(engines, trace)
    engine.set_rounds(4, 2, WINDOW)
    for start in range(0, len(trace), 8):
        check(engine, trace[start : start + 8], wanted[start : start + 8])
    counted = Counted(engine)
    check(engine, many, plain_texts(engines, many))
    assert counted() == (0, 0, 0, 0)


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_several_answers_to_one_seeded_request(engines: Engines, drafter: str) -> None:
    params = SamplingParams(
        n=3, temperature=0.8, seed=5, max_tokens=30, ignore_eos=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )  # fmt: skip
    found = []
    for engine in (engines.plain, engines.tiered(drafter)):
        engine.run([Arrival(0, list(TEXTS[1][:20]), params)])
        answers = sorted(engine.outputs["0"].outputs, key=lambda answer: answer.index)
        found.append([list(answer.token_ids) for answer in answers])
    assert found[0] == found[1]
    assert len(set(map(tuple, found[0]))) == 3


def test_a_draft_model_that_draws_leaves_the_requests_generator_alone(
    engines: Engines, tmp_path: Path
) -> None:
    make_dense(tmp_path / "target", seed=1, **TARGET)
    make_dense(tmp_path / "draft", **DRAFT)
    drafter = {
        "method": "draft_model", "model": str(tmp_path / "draft"), "num_speculative_tokens": 4,
        "draft_sample_method": "probabilistic",
    }  # fmt: skip
    engine = ViaSDEngine(
        str(tmp_path / "target"), drafter, OPTIONS, num_gpu_blocks_override=100, max_num_seqs=12
    )
    trace = requests(20)
    wanted = plain_texts(engines, trace)
    for rounds in (0, 1, 3):
        engine.set_rounds(4, rounds, WINDOW)
        # Whatever it draws.
        torch.manual_seed(rounds)
        check(engine, trace, wanted)
    assert engine.runner.session.counts.slim_accepted > 100


def test_requests_without_a_seed_differ_between_data_parallel_engines() -> None:
    """vLLM gives the answers to one prompt to several of them."""
    drawn = []
    for index in range(3):
        parallel, model = SimpleNamespace(data_parallel_index=index), SimpleNamespace(seed=7)
        config = SimpleNamespace(parallel_config=parallel, model_config=model)
        drawn.append(int(torch.randint(2**62, (), generator=seeds_of_generators(config))))
    assert len(set(drawn)) == 3


def test_requests_without_a_seed_differ_and_reproduce_as_a_whole(engines: Engines) -> None:
    """Each has noise of its own; a restarted engine draws the same for the same requests."""
    engine = engines.ngram
    engine.set_rounds(4, 2, WINDOW)
    params = SamplingParams(temperature=1.0, max_tokens=20, ignore_eos=True)
    found = []
    for _ in range(2):
        engine.runner.seeds.manual_seed(1)
        found.append(texts(engine, [Arrival(0, TEXTS[1][:20], params) for _ in range(4)]))
    assert len(set(map(tuple, found[0]))) == 4
    # Whatever was in the global generator, which nothing of theirs is drawn from.
    assert found[0] == found[1]


@pytest.mark.parametrize("fp64", [False, True])
def test_noise_that_is_a_row_of_the_vocabulary(
    engines: Engines, monkeypatch: pytest.MonkeyPatch, fp64: bool
) -> None:
    """As vLLM draws it on GPUs (and everywhere with float64 noise), not as a seed on CPUs."""
    for engine in (engines.plain, engines.ngram, engines.draft_model):
        drawing = engine.runner.sampler.topk_topp_sampler
        monkeypatch.setattr(drawing, "forward", drawing.forward_native)
        monkeypatch.setattr(drawing, "use_fp64_gumbel", fp64)
    trace = requests(20)
    wanted = [
        texts(engines.plain, [Arrival(0, list(arrival.prompt), arrival.params)])[0]
        for arrival in trace
    ]
    assert wanted != plain_texts(engines, trace)
    for engine in (engines.ngram, engines.draft_model):
        engine.set_rounds(4, 2, WINDOW)
        check(engine, trace, wanted)
