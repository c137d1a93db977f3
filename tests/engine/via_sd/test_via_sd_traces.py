# SPDX-License-Identifier: Apache-2.0
"""Random traces of requests through engines with VIA-SD: tokens, KV cache and drafts are what plain
decoding with transformers gives, whatever was drafted, kept, rejected, preempted or aborted.
"""

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from trace_engine import Arrival
from trace_strategies import arrivals, long_texts, traces
from via_sd_engine import (
    NGRAM,
    TIE,
    ViaSDEngine,
    check_greedy_tokens,
    check_kv_cache,
    check_papers_tokens,
    looked_up,
    slim_logits,
)

from tiny_models import make_dense, make_eagle, make_mimo
from vllm_nvium.model_executor.ops.tiers import ACCEPT, REGENERATE, Checked
from vllm_nvium.model_executor.via_sd.step import Drafts, SlimDraws, Window, extend
from vllm_nvium.via_sd.planner.choose import Planner
from vllm_nvium.via_sd.planner.fixed import FixedRounds
from vllm_nvium.via_sd.planner.model import DraftPlan
from vllm_nvium.via_sd.runner_v1 import V1StepView

VOCABULARY = 64
WINDOW = 12
SKIPPED = (2,)
OPTIONS: dict[str, Any] = {
    "mask": "2", "window": WINDOW, "rounds": 2, "allow_paper_mode": True
}  # fmt: skip
# Models that agree often, but not always, with themselves without a layer and with each other.
TARGET: dict[str, Any] = {"vocab_size": VOCABULARY, "bigrams": 0.7, "whisper": 0.2}
DRAFT: dict[str, Any] = {
    **TARGET, "num_hidden_layers": 2, "hidden_size": 96, "num_attention_heads": 3,
    "num_key_value_heads": 3, "seed": 5,
}  # fmt: skip
_TEXTS = long_texts(VOCABULARY)
# A text that repeats itself, for n-grams.
_TEXTS.append((_TEXTS[0][:17] * 8)[:120])


@dataclass
class Served:
    reference: PreTrainedModel
    engine: ViaSDEngine
    draft: PreTrainedModel | None = None


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    path = tmp_path_factory.mktemp("target")
    return path, make_dense(path, seed=1, **TARGET)


@pytest.fixture(scope="module")
def with_ngrams(target: tuple[Path, PreTrainedModel]) -> Iterator[Served]:
    path, reference = target
    # 10 blocks of 32: one long sequence or a few short ones fit, so preemption is common.
    engine = ViaSDEngine(str(path), NGRAM, OPTIONS, num_gpu_blocks_override=10)
    yield Served(reference, engine)


@pytest.fixture(scope="module")
def with_draft_model(
    target: tuple[Path, PreTrainedModel], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    path, reference = target
    draft_path = tmp_path_factory.mktemp("draft")
    draft = make_dense(draft_path, **DRAFT)
    drafter = {"method": "draft_model", "model": str(draft_path), "num_speculative_tokens": 4}
    engine = ViaSDEngine(str(path), drafter, OPTIONS, num_gpu_blocks_override=20, max_num_seqs=12)
    yield Served(reference, engine, draft)


def papers(accept: float = 0.5, escalate: float = 0.3) -> dict[str, Any]:
    """`extra_args` of a request that asks for the paper's rule."""
    return {"via_sd_mode": "paper", "via_sd_accept": accept, "via_sd_escalate": escalate}


# --- traces ---------------------------------------------------------------------------------------


@st.composite
def params(draw: st.DrawFn) -> SamplingParams:
    kind = draw(
        st.sampled_from(
            ["greedy"] * 5 + ["paper"] * 3 + ["off", "sampled", "seeded", "paper drawn"]
        )
    )
    extra_args = {"via_sd": "off"} if kind == "off" else None
    if kind.startswith("paper"):
        extra_args = papers(
            *draw(st.sampled_from([(0.5, 0.3), (0.9, 0.1), (0.2, 0.2), (1.0, 1.0)]))
        )
    return SamplingParams(
        temperature=0.0 if kind in ("greedy", "off", "paper") else 1.0,
        seed=7 if kind == "seeded" else None,
        ignore_eos=draw(st.sampled_from([True, True, False])),
        extra_args=extra_args,
    )


def via_sd_traces() -> st.SearchStrategy[list[Arrival]]:
    return traces(arrivals(params(), _TEXTS, VOCABULARY), VOCABULARY)


rounds = st.sampled_from([1, 2, 3, "auto"])
windows = st.sampled_from([1, 2, 5, WINDOW])


def play(served: Served, trace: list[Arrival]) -> list[int]:
    """Plays a trace to its end and checks what came out.

    Returns:
        tokens by tier of the windows of greedy requests under the paper's rule.
    """
    engine, by_tier = served.engine, [0, 0, 0]
    engine.handed.clear()
    emitted = engine.run(trace)
    assert engine.blocks_in_use == 0
    for number, arrival in enumerate(trace):
        seen = emitted.get(str(number))
        if seen is None:
            assert arrival.abort_after is not None
            continue
        if arrival.abort_after is None:
            full = arrival.params.max_tokens == len(seen.tokens)
            ended = not arrival.params.ignore_eos and seen.tokens[-1] == 1
            assert full or ended
        if arrival.params.temperature > 0.0:
            continue
        if "via_sd_mode" not in (arrival.params.extra_args or {}):
            check_greedy_tokens(served.reference, arrival.prompt, seen.tokens)
            continue
        asked = arrival.params.extra_args
        kinds = check_papers_tokens(
            served.reference, SKIPPED, arrival.prompt, seen.tokens,
            [window for window in engine.handed if window.request == str(number)],
            asked["via_sd_accept"], asked["via_sd_escalate"],
        )  # fmt: skip
        by_tier = [a + b for a, b in zip(by_tier, kinds, strict=True)]
    return by_tier


EXAMPLES = max(int(os.environ.get("NVIUM_TRACES", "150")) // 10, 5)
MANY = settings(
    max_examples=EXAMPLES,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@MANY
@given(trace=via_sd_traces(), drafts=st.integers(1, 4), rounds=rounds, window=windows)
def test_tokens_with_ngrams_are_greedy_decodings(with_ngrams, trace, drafts, rounds, window):
    with_ngrams.engine.set_rounds(min(drafts, window), rounds, window)
    play(with_ngrams, trace)


@MANY
@given(trace=via_sd_traces(), drafts=st.integers(1, 4), rounds=rounds, window=windows)
def test_tokens_with_a_draft_model_are_greedy_decodings(
    with_draft_model, trace, drafts, rounds, window
):
    with_draft_model.engine.set_rounds(min(drafts, window), rounds, window)
    play(with_draft_model, trace)


# --- what must have happened ----------------------------------------------------------------------


def greedy(max_tokens: int, **fields: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **fields)


def crowd(seed: int, size: int = 10, **fields: Any) -> list[Arrival]:
    """More than fits into the KV cache."""
    generator = random.Random(seed)
    return [
        Arrival(
            2 * i,
            _TEXTS[i % 3][: generator.randint(20, 60)] + [10 + i],
            greedy(generator.randint(50, 70), **fields),
        )
        for i in range(size)
    ]


@pytest.mark.parametrize("drafter", ["with_ngrams", "with_draft_model"])
@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_more_requests_than_fit(request: pytest.FixtureRequest, drafter: str, rounds: int) -> None:
    served: Served = request.getfixturevalue(drafter)
    engine = served.engine
    engine.set_rounds(3, rounds, WINDOW)
    before, preemptions = vars_of(engine), engine.preemptions
    engine.window_rounds.clear()
    play(served, crowd(rounds))
    happened = {key: value - before[key] for key, value in vars_of(engine).items()}
    # Beside a draft model vLLM makes requests wait instead.
    assert drafter == "with_draft_model" or engine.preemptions > preemptions
    assert max(engine.window_rounds) == rounds
    # Both tiers kept tokens and rejected tokens.
    assert 0 < happened["slim_accepted"] < happened["slim_drafted"]
    assert 0 < happened["accepted"] < happened["window_tokens"]
    assert happened["slim_passes"] >= happened["full_passes"] * 0.5


@pytest.mark.parametrize("drafter", ["with_ngrams", "with_draft_model"])
def test_more_requests_of_the_papers_rule_than_fit(
    request: pytest.FixtureRequest, drafter: str
) -> None:
    served: Served = request.getfixturevalue(drafter)
    engine = served.engine
    engine.set_rounds(3, 2, WINDOW)
    before, tiers = vars_of(engine), list(engine.runner.session.counts.tiers)
    preemptions = engine.preemptions
    engine.window_rounds.clear()
    trace = crowd(5)
    for number, arrival in enumerate(trace):
        # Thresholds of their own: some keep everything.
        arrival.params.extra_args = papers(0.0, 0.0) if number % 3 == 0 else papers(0.9, 0.3)
        arrival.prompt[:-1] = random.Random(number).choices(range(3, 9), k=30)
    by_tier = play(served, trace)
    assert drafter == "with_draft_model" or engine.preemptions > preemptions
    assert max(engine.window_rounds) == 2
    assert min(by_tier) > 0, by_tier
    happened = {key: value - before[key] for key, value in vars_of(engine).items()}
    counted = [b - a for a, b in zip(tiers, engine.runner.session.counts.tiers, strict=True)]
    assert sum(counted) == happened["window_tokens"] > happened["accepted"]
    assert happened["slim_accepted"] < happened["slim_drafted"]


@pytest.mark.parametrize("drafter", ["with_ngrams", "with_draft_model"])
def test_a_text_of_the_papers_rule_is_the_same_beside_others(
    request: pytest.FixtureRequest, drafter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At temperature 0 and with the same plan, as long as it gets its turns: the first request is
    never preempted, and its windows are not cut where a step has no room for all."""
    served: Served = request.getfixturevalue(drafter)
    engine = served.engine
    monkeypatch.setattr(engine.scheduler, "_fit_drafts", lambda waiting: 1024)
    engine.set_rounds(3, 2, WINDOW)
    preemptions, differ = engine.preemptions, 0
    for seed in range(6):
        # Of few tokens, so that n-grams find what the full model would not say.
        prompt = random.Random(seed).choices(range(3, 9), k=30)
        mine = Arrival(0, prompt, greedy(40, extra_args=papers(0.01, 1e-4)))
        engine.run([mine])
        alone = engine.emitted["0"].tokens
        others = crowd(seed, 5)
        others[0].params.extra_args = {"via_sd": "off"}
        others[1].params.extra_args = papers(0.9, 0.1)
        others[2].params.temperature = 1.0
        others[3].params.extra_args = papers()
        others[4].abort_after = 9
        play(served, [mine, *others])
        assert engine.emitted["0"].tokens == alone
        engine.run([Arrival(0, prompt, greedy(40))])
        differ += engine.emitted["0"].tokens != alone
    assert drafter == "with_draft_model" or engine.preemptions > preemptions
    # And it is not merely that of plain decoding.
    assert differ > 1


def test_n_answers_under_the_papers_rule(with_draft_model: Served) -> None:
    """With `top_k` 1 they are equal (vLLM has no several answers at temperature 0), drawn ones are
    not; each follows the rule in windows of its own."""
    engine = with_draft_model.engine
    engine.set_rounds(3, 2, WINDOW)
    prompt = random.Random(2).choices(range(3, 9), k=30)
    for top_k, different in ((1, 1), (0, 3)):
        engine.handed.clear()
        params = SamplingParams(
            n=3, temperature=1.0, top_k=top_k, max_tokens=30, ignore_eos=True,
            output_kind=RequestOutputKind.FINAL_ONLY, extra_args=papers(),
        )  # fmt: skip
        engine.run([Arrival(0, prompt, params)])
        answers = [tuple(answer.token_ids) for answer in engine.outputs["0"].outputs]
        assert [len(answer) for answer in answers] == [30] * 3
        assert len(set(answers)) == different
        assert len({window.request for window in engine.handed if window.is_paper}) == 3
        assert engine.blocks_in_use == 0


def test_more_drafts_than_fit_into_one_pass(with_draft_model: Served) -> None:
    """12 requests with 4 drafts each, where a pass takes 48 rows. None waits for a turn."""
    engine = with_draft_model.engine
    together = 0

    def look() -> None:
        nonlocal together
        running = {each.request_id for each in engine.scheduler.running}
        assert running <= set(engine.runner.input_batch.req_id_to_index)
        together = max(together, len(running))

    engine.set_rounds(4, 3, WINDOW)
    most = 0
    check = engine.runner.session.check

    def count(view: Any, windows: Any, drafts: Any) -> Any:
        nonlocal most
        most = max(most, len(windows) + sum(map(len, drafts.tokens)))
        return check(view, windows, drafts)

    engine.runner.session.check = count
    engine.after_step = look
    try:
        # Short ones: all of them are decoded at once.
        play(with_draft_model, [Arrival(0, [10 + i, 20], greedy(20)) for i in range(12)])
    finally:
        engine.runner.session.check, engine.after_step = check, None
    assert 30 < most <= 48
    assert together == 12


def vars_of(engine: ViaSDEngine) -> dict[str, int]:
    counts = engine.runner.session.counts
    sums = {name: getattr(counts, name) for name in counts.__slots__}
    return {name: value for name, value in sums.items() if isinstance(value, int)}


class Look:
    """Looks into the KV cache after every third step."""

    def __init__(self, engine: ViaSDEngine, reference: PreTrainedModel) -> None:
        self.engine, self.reference = engine, reference
        self.steps = self.compared = 0

    def __call__(self) -> None:
        self.steps += 1
        if self.steps % 3 == 0:
            self.compared += check_kv_cache(self.engine, self.reference)


# --- families -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_every_family(kind: str, tmp_path: Path) -> None:
    """Gemma has full and sliding layers, and so two groups of KV caches."""
    ties = {"tie_word_embeddings": kind.startswith("gemma")}
    reference = make_dense(tmp_path, kind, seed=1, **(TARGET | {"bigrams": 0.0} | ties))
    options = {"mask": "2", "window": WINDOW, "rounds": 2}
    engine = ViaSDEngine(str(tmp_path), NGRAM, options, num_gpu_blocks_override=20)
    groups = len(engine.runner.kv_cache_config.kv_cache_groups)
    assert groups == (2 if kind.startswith("gemma") else 1)
    look = Look(engine, reference)
    engine.after_step = look
    play(Served(reference, engine), crowd(3, size=5))
    assert look.compared > 500 and max(engine.window_rounds) >= 1
    counts = engine.runner.session.counts
    assert 0 < counts.slim_accepted < counts.slim_drafted
    assert 0 < counts.accepted < counts.window_tokens


# --- drafters that answer once per window ---------------------------------------------------------


@pytest.mark.parametrize("method", ["suffix", "eagle", "eagle3", "mtp"])
def test_drafters_that_answer_once(
    method: str, target: tuple[Path, PreTrainedModel], tmp_path: Path
) -> None:
    path, reference = target
    drafter: dict[str, Any] = {"method": method, "num_speculative_tokens": 4}
    remote = {}
    if method == "suffix":
        pytest.importorskip("arctic_inference", reason="suffix decoding is a package of its own")
    elif method == "mtp":
        path, remote = tmp_path / "mimo", {"trust_remote_code": True}
        reference = make_mimo(path, **TARGET)
    else:
        make_eagle(tmp_path / "head", method, reference)
        drafter["model"] = str(tmp_path / "head")
    options = {"mask": "2", "window": WINDOW, "rounds": "auto"}
    engine = ViaSDEngine(str(path), drafter, options, num_gpu_blocks_override=20, **remote)
    served = Served(reference, engine)
    play(served, crowd(2, size=5))  # `auto` begins without drafts
    checked = 0
    for drafts, rounds in ((3, 1), (4, 0), (1, 1)):
        engine.set_rounds(drafts, rounds)
        engine.asked.clear()
        engine.window_rounds.clear()
        before = vars_of(engine)
        play(served, crowd(4, size=5))
        happened = {key: value - before[key] for key, value in vars_of(engine).items()}
        if not rounds:
            assert not engine.handed and not happened["slim_passes"]
            continue
        assert set(engine.window_rounds) == {1}
        assert max(len(asked.drafts) for asked in engine.asked) == drafts
        # Each window is the drafts that its check kept and a token of the slim verifier's.
        kept = [len(window.tokens) - 1 for window in engine.handed]
        assert 10 < happened["slim_accepted"] == sum(kept) < happened["slim_drafted"]
        assert 10 < happened["accepted"] < happened["window_tokens"]
        opened = {tuple(asked.prefix): asked.drafts for asked in engine.asked}
        for count, window in zip(kept, engine.handed, strict=True):
            its = opened[tuple(window.prefix)]
            assert window.tokens[:count] == its[:count] and count <= len(its) <= drafts
        checked += check_slim_tokens(engine, reference)
        assert 0 < happened["slim_passes"] <= len(kept)
        # The last window of a text, and those of preempted requests, may go unread.
        assert len(kept) // 2 < happened["windows"] <= len(kept)
    assert checked > 100


def check_slim_tokens(engine: ViaSDEngine, reference: PreTrainedModel) -> int:
    """Every token of every lossless window is what the slim verifier says after those before it.

    Returns:
        how many tokens there were.
    """
    for window in engine.handed:
        newest = [window.prefix[-1], *window.tokens]
        logits = slim_logits(reference, SKIPPED, window.prefix[:-1], newest)[:-1]
        found = logits.gather(1, torch.tensor(window.tokens)[:, None]).squeeze(1)
        assert (logits.amax(dim=1) - found).max() < TIE, window
    return sum(len(window.tokens) for window in engine.handed)


# --- what vLLM's scheduler may add ----------------------------------------------------------------


def test_no_drafts_that_nobody_made(with_ngrams: Served) -> None:
    """A request that needs one token, because the cache has all others, would get a window of
    drafts -1 from vLLM."""
    engine = with_ngrams.engine
    engine.set_rounds(3, 2, WINDOW)
    prompt = [random.Random(99).randrange(3, VOCABULARY) for _ in range(33)]  # a block and a token
    seeded = SamplingParams(temperature=1.0, seed=3, max_tokens=20, ignore_eos=True)
    verified: list[int] = []

    def look() -> None:
        for tokens in engine.runner.session.verified.values():
            verified.extend(tokens)

    engine.after_step = look
    try:
        cold = engine.run([Arrival(0, list(prompt), seeded)])["0"].tokens
        trace = [Arrival(0, [5, 6, 7], greedy(30)), Arrival(3, list(prompt), seeded)]
        cached = engine.run(trace)["1"].tokens
        assert engine.outputs["1"].num_cached_tokens == 32
    finally:
        engine.after_step = None
    assert cached == cold
    assert verified and min(verified) >= 0


def test_no_tier_above_the_largest_batch(with_ngrams: Served) -> None:
    """`--via-sd-max-batch` beside a fixed number of rounds."""
    engine = with_ngrams.engine
    engine.runner.session.planner = FixedRounds(3, 2, max_batch=2)
    sizes: list[int] = []
    grow = engine.runner._grow_windows

    def count() -> None:
        sizes.append(len(engine.runner.session.drafting(V1StepView(engine.runner))))
        grow()

    engine.runner._grow_windows = count
    try:
        play(with_ngrams, [Arrival(0, _TEXTS[2][:20], greedy(10 * (1 + i))) for i in range(4)])
    finally:
        engine.runner._grow_windows = grow
    assert sizes and max(sizes) == 2


def seeded_go_one_at_a_time(batch: Any, params: Any) -> list[bool]:
    return [each.seed is not None for each in params]


ONE_AT_A_TIME = "vllm_nvium.via_sd.runner_v1.draws_one_at_a_time"


def test_who_goes_one_token_at_a_time_is_asked_once_a_step(
    with_ngrams: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, asked, steps = with_ngrams.engine, 0, 0

    def nobody(batch: Any, params: Any) -> list[bool]:
        nonlocal asked
        asked += 1
        return [False] * len(params)

    def count() -> None:
        nonlocal steps
        steps += 1

    monkeypatch.setattr(ONE_AT_A_TIME, nobody)
    engine.set_rounds(3, 2, WINDOW)
    engine.after_step, engine.window_rounds = count, []
    try:
        play(with_ngrams, crowd(3, size=3))
    finally:
        engine.after_step = None
    assert engine.window_rounds and 0 < asked <= steps


def test_requests_without_drafts_count_for_the_largest_batch(
    with_ngrams: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their rows are in the passes all the same."""
    monkeypatch.setattr(ONE_AT_A_TIME, seeded_go_one_at_a_time)
    engine = with_ngrams.engine
    seeded = SamplingParams(temperature=1.0, seed=3, max_tokens=30, ignore_eos=True)
    # The others decode when the first one starts, and still when it ends.
    trace = [*[Arrival(0, _TEXTS[1][:20], seeded)] * 2, Arrival(6, _TEXTS[2][:20], greedy(12))]
    for most, rounds in ((3, True), (2, False)):
        engine.runner.session.planner = FixedRounds(3, 2, max_batch=most)
        engine.window_rounds.clear()
        engine.run(trace)
        assert bool(engine.window_rounds) == rounds


def test_drafts_up_to_the_end_of_the_context(with_ngrams: Served) -> None:
    """vLLM leaves room for all tokens that a step may verify, here a window of 12, before it asks
    the drafter: one text near its end would leave the whole batch without drafts."""
    engine = with_ngrams.engine
    engine.set_rounds(3, 1, WINDOW)
    longest = engine.runner.max_model_len
    prompt = (_TEXTS[0][:17] * 20)[: longest - 40]
    engine.asked.clear()
    play(with_ngrams, [Arrival(0, prompt, greedy(40))])
    # Where the drafter is not asked, vLLM puts zeros.
    assert longest - WINDOW < max(len(asked.prefix) for asked in engine.asked if any(asked.drafts))


def test_nobody_drafts_for_requests_that_go_one_token_at_a_time(
    with_draft_model: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A draft model sees their tokens, for its KV cache, and no more."""
    monkeypatch.setattr(ONE_AT_A_TIME, seeded_go_one_at_a_time)
    engine = with_draft_model.engine
    engine.set_rounds(4, 2, WINDOW)
    asked: list[int] = []
    propose = GPUModelRunner.propose_draft_token_ids

    def recorded(runner: Any, scheduler_output: Any, *args: Any, **options: Any) -> Any:
        asked.append(scheduler_output.num_spec_tokens_to_schedule)
        return propose(runner, scheduler_output, *args, **options)

    monkeypatch.setattr(GPUModelRunner, "propose_draft_token_ids", recorded)
    seeded = SamplingParams(temperature=1.0, seed=3, max_tokens=12, ignore_eos=True)
    engine.run([Arrival(0, _TEXTS[1][:20], seeded)])
    assert len(asked) >= 10 and set(asked) == {0}
    engine.run([Arrival(0, _TEXTS[1][:20], seeded), Arrival(0, _TEXTS[0][:20], greedy(12))])
    assert 4 in asked


def test_windows_tell_what_the_full_model_makes_of_drafts(with_draft_model: Served) -> None:
    """Held against the text: plain drafts would have been accepted as far as they are it, at any
    temperature."""
    engine = with_draft_model.engine
    judged: list[tuple[float, float]] = []

    class TwoRounds(Planner):
        def plan(self, *args: Any) -> DraftPlan:
            return DraftPlan(3, 2)

        def another_round(self, lengths: Any, done: int, *args: Any) -> bool:
            return bool(done < 2)

        def observe_full_check(self, *args: Any, **options: Any) -> None:
            self.is_window = args[3]
            super().observe_full_check(*args, **options)

        def _observe_rate(self, name: str, kind: str, good: float, bad: float) -> None:
            if kind == "accept_full" and self.is_window:
                judged.append((good, bad))

    found = [0.0, 0.0]
    for number, temperature in ((0, 0.0), (1, 0.0), (2, 0.0), (3, 0.0), (2, 1.0)):
        prompt = list(_TEXTS[number % len(_TEXTS)][number : number + 24])
        params = SamplingParams(temperature=temperature, max_tokens=60, ignore_eos=True)
        engine.set_rounds(3, 2, WINDOW)
        engine.runner.session.planner = TwoRounds(3, WINDOW)
        engine.asked.clear()
        judged.clear()
        text = prompt + engine.run([Arrival(0, prompt, params)])["0"].tokens
        opened = [asked for asked in engine.asked if asked.round == 1 and asked.drafts]
        # At the end drafts have no room for a window, and a window is not verified any more.
        assert 0 <= len(opened) - len(judged) <= 2
        for (good, bad), asked in zip(judged, opened, strict=False):
            drafts = asked.drafts[: min(3, asked.room - 1)]
            pairs = enumerate(zip(drafts, text[len(asked.prefix) :], strict=False))
            direct = next((i for i, (a, b) in pairs if a != b), len(drafts))
            assert good <= direct
            assert not bad or good == direct < len(drafts)
            found = [found[0] + good, found[1] + bad]
    assert found[0] > 20 and found[1] > 3


def test_a_prompts_last_token_is_no_decode_step(with_ngrams: Served) -> None:
    """With all others in the cache it is one row, as of a request that decodes."""
    engine = with_ngrams.engine
    engine.set_rounds(0, 0, WINDOW)
    prompt = [random.Random(98).randrange(3, VOCABULARY) for _ in range(33)]  # a block and a token
    engine.run([Arrival(0, list(prompt), greedy(1))])
    turns = engine.runner.session.counts.turns
    engine.run([Arrival(0, list(prompt), greedy(1))])
    assert engine.outputs["0"].num_cached_tokens == 32
    assert engine.runner.session.counts.turns == turns


@pytest.mark.parametrize("drafts", [0, 3])
def test_a_draft_model_is_timed_where_requests_decode(
    with_draft_model: Served, drafts: int
) -> None:
    """Also when it is asked for no drafts, and not while it reads a prompt."""
    engine = with_draft_model.engine
    engine.set_rounds(drafts, 0, WINDOW)
    seen: list[str] = []

    class Told(Planner):
        def plan(self, *args: Any) -> DraftPlan:
            return DraftPlan(drafts, 0)

        def observe_full_pass(self, *args: Any) -> None:
            seen.append("full")

        def observe_draft_call(self, requests: int, asked: int, seconds: float) -> None:
            assert (requests, asked) == (1, drafts) and seconds > 0
            seen.append("draft")

    engine.runner.session.planner = Told(3, WINDOW)
    engine.run([Arrival(0, _TEXTS[1][:30], greedy(24))])
    assert seen.count("full") > 5
    assert seen.count("full") - 1 <= seen.count("draft") <= seen.count("full")


def test_nothing_stays_behind_a_token_that_ends_the_text() -> None:
    window = Window(0, 5, 9, limit=8, stop_tokens=frozenset({7}))
    found = Checked(torch.tensor([3]), torch.tensor([4]), torch.full((1, 4), ACCEPT))
    draws = SlimDraws(torch.tensor([1, 7, 2, 5]), [0.9, 0.8, 0.7, 0.6])
    extend([window], Drafts([[1, 7, 2]]), draws, found)
    assert window.confidences == [0.9, 0.8]
    assert window.tokens == [1, 7] and not window.is_open
    assert len(window.tiers) == 2


# --- start ----------------------------------------------------------------------------------------


def test_the_slim_verifier_is_compiled_at_start(target: tuple[Path, PreTrainedModel]) -> None:
    path, reference = target
    options = {"mask": "2", "window": WINDOW, "rounds": 2}
    engine = ViaSDEngine(
        str(path), NGRAM, options, num_gpu_blocks_override=20, enforce_eager=False,
        compilation_config={"backend": "eager"},
    )  # fmt: skip
    layers = engine.runner.slim.layers
    assert engine.runner.get_model().model.compiled, "of vLLM"
    assert layers.compiled
    play(Served(reference, engine), crowd(3, size=5))
    assert check_slim_tokens(engine, reference) > 50


# --- the KV cache ---------------------------------------------------------------------------------


@pytest.mark.parametrize("drafter", ["with_ngrams", "with_draft_model"])
@pytest.mark.parametrize("mode", ["lossless", "paper"])
def test_the_kv_cache_is_that_of_plain_decoding(
    request: pytest.FixtureRequest, drafter: str, mode: str
) -> None:
    """At every position that counts as computed, between two steps; under the paper's rule too,
    whose tokens the full model reads though it is not asked about them."""
    served: Served = request.getfixturevalue(drafter)
    engine = served.engine
    engine.set_rounds(4, 2, WINDOW)
    rule = papers(0.8, 0.2) if mode == "paper" else None
    engine.after_step = look = Look(engine, served.reference)
    try:
        by_tier = play(served, crowd(7, size=4, extra_args=rule))
    finally:
        engine.after_step = None
    assert look.compared > 500
    assert rule is None or by_tier[ACCEPT] + by_tier[REGENERATE] > 100, by_tier


# --- the drafter ----------------------------------------------------------------------------------


def test_a_draft_model_drafts_what_it_says_behind_the_same_tokens(with_draft_model: Served) -> None:
    """In every round of every window: its own KV cache holds what it should."""
    engine, draft = with_draft_model.engine, with_draft_model.draft
    assert draft is not None
    engine.set_rounds(4, 3, WINDOW)
    engine.asked.clear()
    play(with_draft_model, crowd(11, size=3))
    checked = [0, 0, 0]
    for asked in engine.asked:
        drafts = asked.drafts[: 256 - len(asked.prefix)]
        check_greedy_tokens(draft, asked.prefix, drafts)
        checked[asked.round - 1] += len(drafts)
    assert min(checked) > 20


def test_ngrams_go_on_behind_the_window(with_ngrams: Served) -> None:
    engine = with_ngrams.engine
    engine.set_rounds(4, 3, WINDOW)
    engine.asked.clear()
    play(with_ngrams, crowd(12))
    checked = [0, 0, 0]
    for asked in engine.asked:
        assert asked.drafts == looked_up(asked.prefix, min(4, asked.room), longest=3)
        checked[asked.round - 1] += len(asked.drafts)
    assert min(checked) > 30
