# SPDX-License-Identifier: Apache-2.0
"""Windows that do not fit into a step together: every request that decodes has its token in every
step, as in plain decoding, prompts go on beside them, and the text is the same.
"""

import itertools
import os
import random
from collections.abc import Callable
from typing import Any

import pytest
from vllm import SamplingParams

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from trace_engine import Arrival, TraceEngine, _public
from via_sd_engine import NGRAM, ViaSDEngine

from tiny_models import make_dense, save_character_tokenizer

VOCABULARY = 98
LETTERS = {letter: 3 + ord(letter) - 32 for letter in map(chr, range(32, 127))}
REASONING = {"reasoning_start_str": "<", "reasoning_end_str": ">."}
WINDOW = 8
OPTIONS = {"mask": "2", "window": WINDOW, "rounds": 2, "allow_paper_mode": True}
TOKENS = 16  # of a step
COMMON: dict[str, Any] = {"num_gpu_blocks_override": 100, "max_num_seqs": 3}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("characters")
    make_dense(path, seed=2, vocab_size=VOCABULARY, bigrams=0.9, whisper=0.05)
    save_character_tokenizer(path)
    return str(path)


@pytest.fixture(scope="module")
def plain(model: str) -> TraceEngine:
    return TraceEngine(model, reasoning_config=REASONING, **COMMON)


@pytest.fixture(scope="module", params=["ngram", "draft_model"])
def tiered(model: str, request: pytest.FixtureRequest) -> ViaSDEngine:
    drafter = NGRAM
    if request.param == "draft_model":
        drafter = {"method": "draft_model", "model": model, "num_speculative_tokens": 4}
    return ViaSDEngine(
        model,
        drafter,
        OPTIONS,
        max_num_batched_tokens=TOKENS,
        reasoning_config=REASONING,
        **COMMON,
    )


def repeated(number: int) -> list[int]:
    """A prompt that repeats itself."""
    generator = random.Random(number)
    return [generator.randrange(3, VOCABULARY) for _ in range(4)] * 2


def greedy(most: int = 40, **fields: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=most, ignore_eos=True, **fields)


def texts_of(engine: TraceEngine, trace: list[Arrival]) -> list[list[int]]:
    emitted = engine.run(trace)
    return [emitted[str(number)].tokens for number in range(len(trace))]


def watch(
    engine: ViaSDEngine, monkeypatch: pytest.MonkeyPatch, see: Callable[[Any, set[str], Any], None]
) -> list[int]:
    """Calls `see(scheduler, decoding, output)` in every step, where `decoding` are the running
    requests that have a token; returns a list that the lengths of verified windows go to."""
    scheduler, lengths = engine.scheduler, []
    schedule = scheduler.schedule

    def schedule_and_see(*args: Any, **kwargs: Any) -> Any:
        decoding = {each.request_id for each in scheduler.running if each.num_output_tokens}
        output = schedule(*args, **kwargs)
        lengths.extend(map(len, output.scheduled_spec_decode_tokens.values()))
        see(scheduler, decoding, output)
        return output

    monkeypatch.setattr(scheduler, "schedule", schedule_and_see)
    return lengths


def test_every_request_has_its_token_in_every_step(
    plain: TraceEngine, tiered: ViaSDEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = 0

    def see(scheduler: Any, decoding: set[str], output: Any) -> None:
        nonlocal full
        assert decoding <= set(output.num_scheduled_tokens)
        full += len(decoding) == 3

    trace = [Arrival(0, repeated(number), greedy()) for number in range(3)]
    lengths = watch(tiered, monkeypatch, see)
    assert texts_of(tiered, trace) == texts_of(plain, trace)
    assert full and max(lengths) > 1


def test_no_window_is_grown_that_is_cut(
    tiered: ViaSDEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session knows the bound, so that slim passes are not for nothing."""
    scheduler, seen = tiered.scheduler, []
    schedule = scheduler.schedule

    def schedule_and_see(*args: Any, **kwargs: Any) -> Any:
        decoding = [each for each in scheduler.running if each.num_output_tokens]
        grown = {each.request_id: len(each.spec_token_ids) for each in decoding}
        output = schedule(*args, **kwargs)
        verified = output.scheduled_spec_decode_tokens
        seen.append((grown, {name: len(verified.get(name, ())) for name in grown}))
        return output

    monkeypatch.setattr(scheduler, "schedule", schedule_and_see)
    most = [20, 30, 40]
    texts_of(tiered, [Arrival(0, repeated(i), greedy(each)) for i, each in enumerate(most)])
    # From the second step on in which all decode.
    pairs = list(itertools.pairwise(seen))
    of_three = [now for before, now in pairs if len(before[0]) == len(now[0]) == 3]
    assert of_three and all(grown == verified for grown, verified in of_three)
    has_drafts = TOKENS - 3 * (1 + scheduler._drafter_slots)
    assert has_drafts - 3 < max(sum(grown.values()) for grown, _ in of_three) <= has_drafts
    # Where fewer decode, windows are longer.
    of_fewer = [grown for grown, _ in seen if 0 < len(grown) < 3]
    assert any(max(grown.values()) > has_drafts // 3 for grown in of_fewer)


def test_prompts_that_cannot_begin_keep_no_room(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The KV cache has no blocks for one that waits: those who decode have whole windows."""
    engine = ViaSDEngine(
        model, NGRAM, OPTIONS, max_num_batched_tokens=TOKENS, max_num_seqs=3,
        num_gpu_blocks_override=10,
    )  # fmt: skip
    verified: list[int] = []

    def see(scheduler: Any, decoding: set[str], output: Any) -> None:
        if len(decoding) == 1 and len(scheduler.waiting) == 1:
            counts = map(len, output.scheduled_spec_decode_tokens.values())
            verified.append(sum(counts))

    trace = [
        Arrival(0, repeated(0) * 12, greedy(100)),
        Arrival(10, [random.Random(9).randrange(3, VOCABULARY) for _ in range(200)], greedy(4)),
    ]
    watch(engine, monkeypatch, see)
    texts_of(engine, trace)
    # Of 15 tokens the prompt would have 8, so that windows had 7 at most.
    assert len(verified) > 8 and verified[2:].count(WINDOW) > 2


@pytest.mark.parametrize("budget", [2, 5, 9])
def test_the_end_of_a_thought_is_said_once(
    plain: TraceEngine, tiered: ViaSDEngine, budget: int
) -> None:
    """A request that leaves the batch in the middle of a forced end is told of its budget anew."""
    thinking = greedy(30, thinking_token_budget=budget)
    prompt = [*repeated(3), LETTERS["<"], 40, 41]
    # Beside windows of all lengths.
    for delay in range(5):
        trace = [Arrival(0, repeated(number), greedy()) for number in range(2)]
        trace.append(Arrival(delay, list(prompt), thinking))
        found = texts_of(tiered, trace)
        assert found == texts_of(plain, trace)
        assert LETTERS[">"] in found[2]


@pytest.mark.parametrize("mode", ["lossless", "paper"])
def test_a_prompt_is_computed_beside_windows(
    tiered: ViaSDEngine, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has half of what those who decode leave: of 14 tokens 7."""
    waited: list[int] = []

    def see(scheduler: Any, decoding: set[str], output: Any) -> None:
        assert decoding <= set(output.num_scheduled_tokens)
        for new in [*scheduler.running, *scheduler.waiting]:
            if _public(new.request_id) == "2" and not new.num_output_tokens:
                waited.append(output.num_scheduled_tokens.get(new.request_id, 0))

    extra = {"via_sd_mode": mode} if mode == "paper" else None
    trace = [Arrival(0, repeated(number), greedy(100, extra_args=extra)) for number in range(2)]
    prompt = [random.Random(9).randrange(3, VOCABULARY) for _ in range(70)]
    trace.append(Arrival(6, prompt, greedy(4)))
    assert tiered.engine.reset_prefix_cache()
    lengths = watch(tiered, monkeypatch, see)
    texts_of(tiered, trace)
    slots = tiered.scheduler._drafter_slots
    assert sum(waited) == len(prompt)
    assert all(count >= (TOKENS - 2) // 2 - 2 * slots for count in waited[:-1])
    assert max(lengths) > 1


def test_requests_of_all_kinds(
    plain: TraceEngine, tiered: ViaSDEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many more than have a place, with prompts that take several steps."""

    def see(scheduler: Any, decoding: set[str], output: Any) -> None:
        assert decoding - {each.request_id for each in scheduler.waiting} <= set(
            output.num_scheduled_tokens
        )
        assert sum(output.num_scheduled_tokens.values()) <= TOKENS

    generator = random.Random(4)
    trace = []
    for number in range(12):
        prompt = repeated(number) * generator.choice([1, 1, 5])
        fields: dict[str, Any] = {}
        if number % 4 == 1:
            prompt, fields = [*prompt, LETTERS["<"], 40], {"thinking_token_budget": number}
        if number % 4 == 2:
            fields = {"repetition_penalty": 1.2}
        trace.append(Arrival(generator.randrange(20), prompt, greedy(25, **fields)))
    watch(tiered, monkeypatch, see)
    mine = texts_of(tiered, trace)
    assert mine == texts_of(plain, trace)
