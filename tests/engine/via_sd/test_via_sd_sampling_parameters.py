# SPDX-License-Identifier: Apache-2.0
"""Every field of vLLM's `SamplingParams`, and logits processors of users: what VIA-SD answers is
what plain vLLM answers, at temperature 0 and with a seed, or both refuse.
"""

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import (
    RepetitionDetectionParams,
    RequestOutputKind,
    StructuredOutputsParams,
)
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor, LogitsProcessor

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from trace_engine import Arrival, TraceEngine
from via_sd_engine import NGRAM, ViaSDEngine

from tiny_models import make_dense, save_character_tokenizer
from vllm_nvium.via_sd import row_metadata

# The vocabulary is that of the tokenizer: no token is without a character.
VOCABULARY = 98
_RANDOM = random.Random(0)
PROMPT = [_RANDOM.randrange(3, VOCABULARY) for _ in range(12)] * 2
LETTERS = {letter: 3 + ord(letter) - 32 for letter in map(chr, range(32, 127))}
COMMON: dict[str, Any] = {"num_gpu_blocks_override": 100, "max_num_seqs": 8}
# On CPU plain vLLM fails where the prompt of a seeded request is computed in chunks.
PLAIN: dict[str, Any] = COMMON | {"max_num_batched_tokens": 1024}
WINDOW = 8
TIERED = {"mask": "2", "window": WINDOW, "rounds": 2}
# What ends a thought; a token that begins one is in every prompt of a request with a budget.
REASONING = {"reasoning_start_str": "<", "reasoning_end_str": ">."}


@dataclass
class Case:
    """Values of one or more fields.

    Attributes:
        prompt: tokens put behind the prompt.
        refused: words of vLLM's refusal.
        one_by_one: has no drafts.
        random_only: is refused at temperature 0.
    """

    fields: dict[str, Any]
    prompt: tuple[int, ...] = ()
    refused: str = ""
    one_by_one: bool = False
    random_only: bool = False


def case(**fields: Any) -> Case:
    return Case(fields)


def structured(**kind: Any) -> Case:
    fields = {"structured_outputs": StructuredOutputsParams(**kind), "ignore_eos": False}
    return Case(fields | {"max_tokens": 60})


# Field -> values of it; fields that a user cannot set have none.
CASES: dict[str, list[Case]] = {
    "n": [Case({"n": 3, "output_kind": RequestOutputKind.FINAL_ONLY}, random_only=True)],
    "presence_penalty": [case(presence_penalty=1.0), case(presence_penalty=-0.7)],
    "frequency_penalty": [case(frequency_penalty=0.7)],
    "repetition_penalty": [case(repetition_penalty=1.5), case(repetition_penalty=0.8)],
    "temperature": [case(), case(temperature=0.4), case(temperature=1.4)],
    "watermarking": [case(watermarking=True), case(watermarking=False)],
    "top_p": [case(top_p=0.6)],
    "top_k": [case(top_k=1), case(top_k=4)],
    "min_p": [case(min_p=0.2), case(min_p=0.01, top_p=0.9, repetition_penalty=1.1)],
    "seed": [case(seed=3), case(seed=2**40 + 1), case(seed=0)],
    "stop": [case(stop=["a", "b", "7", "xy"]), case(stop=list("etaoinshrdlu"))],
    "stop_token_ids": [case(stop_token_ids=list(range(3, 20)), ignore_eos=False)],
    "ignore_eos": [case(ignore_eos=False, logit_bias={1: 4.0})],
    "max_tokens": [case(max_tokens=1), case(max_tokens=2), case(max_tokens=9)],
    "min_tokens": [
        case(min_tokens=25, stop_token_ids=list(range(3, 40)), ignore_eos=False),
        case(min_tokens=3, stop_token_ids=list(range(3, 97)), ignore_eos=False),
    ],
    "logprobs": [case(logprobs=0), case(logprobs=4), case(logprobs=-1)],
    "prompt_logprobs": [case(prompt_logprobs=0), case(prompt_logprobs=3, logprobs=2)],
    "prompt_logprob_token_ids": [
        Case({"prompt_logprob_token_ids": np.array([[5, 6]])}, refused="V2 model runner")
    ],
    "prompt_logprob_start": [
        Case(
            {"prompt_logprob_token_ids": np.array([[5]]), "prompt_logprob_start": 3},
            refused="V2 model runner",
        )
    ],
    "logprob_token_ids": [case(logprob_token_ids=[5, 6, 7])],
    "flat_logprobs": [case(flat_logprobs=True, logprobs=2)],
    "detokenize": [case(detokenize=False)],
    "skip_special_tokens": [case(skip_special_tokens=False, logit_bias={1: 6.0, 2: 5.0})],
    "spaces_between_special_tokens": [case(spaces_between_special_tokens=False)],
    "include_stop_str_in_output": [
        case(include_stop_str_in_output=True, stop=["a", "b", "7", "xy", "e"])
    ],
    "output_kind": [case(output_kind=RequestOutputKind.FINAL_ONLY)],
    "stream_interval": [case(stream_interval=3)],
    "skip_clone": [case(skip_clone=True)],
    "output_text_buffer_length": [],
    "_eos_token_id": [],
    "_all_stop_token_ids": [],
    "_watermarking_skipped": [],
    "structured_outputs": [
        structured(choice=["abcabcabd", "abcabcabcabe", "xyz"]),
        structured(regex="(ab|cd){6,12}x"),
        structured(grammar='root ::= ("yes " | "no "){3,8} "end"'),
        structured(json={"type": "object", "properties": {"age": {"type": "integer"}}}),
    ],
    "logit_bias": [
        case(logit_bias={LETTERS["q"]: 6.0, LETTERS["w"]: 6.0, LETTERS["e"]: -100.0}),
        case(logit_bias={LETTERS["a"]: 2.0}, frequency_penalty=0.5, top_k=20),
    ],
    "allowed_token_ids": [case(allowed_token_ids=list(range(20, 50)))],
    "extra_args": [case(extra_args={"via_sd": "off"}), case(extra_args={"other": 1})],
    "bad_words": [case(bad_words=["a", "e", "xy", "12", "t"]), case(bad_words=list("0123456789"))],
    "_bad_words_token_ids": [],
    "skip_reading_prefix_cache": [case(skip_reading_prefix_cache=True)],
    "thinking_token_budget": [
        Case({"thinking_token_budget": budget}, prompt=(LETTERS["<"], 40, 41), one_by_one=True)
        for budget in (0, 3, 5, 20)
    ],
    "repetition_detection": [
        case(
            repetition_detection=RepetitionDetectionParams(
                max_pattern_size=4, min_pattern_size=1, min_count=3
            ),
            temperature=0.2,
        )
    ],
    "routed_experts_prompt_start": [case(routed_experts_prompt_start=2)],
    "trace_decode_token_ids": [
        Case({"trace_decode_token_ids": [5, 6, 7]}, refused="--enable-trace-replay")
    ],
}


def test_every_field_has_its_cases() -> None:
    """A field that a new version of vLLM brings fails here until it is listed."""
    assert set(CASES) == set(SamplingParams.__struct_fields__)
    for name, cases in CASES.items():
        for one in cases:
            assert name == "temperature" or name in one.fields


def params_of(one: Case, greedy: bool) -> SamplingParams:
    fields = {"max_tokens": 30, "ignore_eos": True, "temperature": 0.9, "seed": 7} | one.fields
    if greedy:
        fields |= {"temperature": 0.0, "seed": None}
    return SamplingParams(**fields)


LISTED = [
    pytest.param(one, id=f"{name}-{number}")
    for name, cases in CASES.items()
    for number, one in enumerate(cases)
]


@dataclass
class Engines:
    plain: TraceEngine
    tiered: ViaSDEngine
    known: dict[tuple[int, bool], Any] = field(default_factory=dict)

    def plain_answer(self, one: Case, greedy: bool) -> Any:
        key = id(one), greedy
        if key not in self.known:
            self.known[key] = answers(self.plain, [arrival(one, greedy)])[0]
        return self.known[key]


@pytest.fixture(scope="module", params=["raw_logprobs", "processed_logprobs"])
def engines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engines:
    path: Path = tmp_path_factory.mktemp("characters")
    make_dense(path, seed=2, vocab_size=VOCABULARY, bigrams=0.7, whisper=0.2)
    save_character_tokenizer(path)
    options = {"reasoning_config": REASONING, "logprobs_mode": request.param, "max_logprobs": -1}
    return Engines(
        TraceEngine(str(path), **PLAIN, **options),
        ViaSDEngine(str(path), NGRAM, TIERED, **COMMON, **options),
    )


def arrival(one: Case, greedy: bool) -> Arrival:
    return Arrival(0, [*PROMPT, *one.prompt], params_of(one, greedy))


def answers(engine: TraceEngine, trace: list[Arrival]) -> list[Any]:
    if not isinstance(engine, ViaSDEngine):
        # Which refuses options of VIA-SD.
        for each in trace:
            if "via_sd" in (each.params.extra_args or {}):
                each.params.extra_args = None
    engine.run(trace)
    return [engine.outputs[str(i)] for i in range(len(trace))]


def check_same(mine: Any, theirs: Any, logprobs: bool = True) -> None:
    assert len(mine.outputs) == len(theirs.outputs)
    for left, right in zip(
        *(sorted(one.outputs, key=lambda each: each.index) for one in (mine, theirs)), strict=True
    ):
        assert left.token_ids == right.token_ids
        assert (left.text, left.finish_reason, left.stop_reason) == (
            right.text, right.finish_reason, right.stop_reason,
        )  # fmt: skip
        if logprobs:
            check_logprobs(left.logprobs, right.logprobs)
    if logprobs:
        check_logprobs(mine.prompt_logprobs, theirs.prompt_logprobs)


def check_logprobs(mine: Any, theirs: Any) -> None:
    assert (mine is None) == (theirs is None)
    for left, right in zip(mine or (), theirs or (), strict=True):
        if right is None:
            assert left is None
            continue
        assert left.keys() == right.keys()
        for token, value in right.items():
            assert left[token].logprob == pytest.approx(value.logprob, abs=1e-3)
            assert left[token].rank == value.rank


@pytest.mark.parametrize("greedy", [True, False], ids=["greedy", "seeded"])
@pytest.mark.parametrize("one", LISTED)
def test_answers_are_those_of_plain_decoding(engines: Engines, one: Case, greedy: bool) -> None:
    if greedy and one.random_only:
        pytest.skip("vLLM has no several answers at temperature 0")
    if one.refused:
        for engine in (engines.plain, engines.tiered):
            with pytest.raises((ValueError, VLLMValidationError), match=one.refused):
                each = arrival(one, greedy)
                engine.engine.add_request("no", {"prompt_token_ids": each.prompt}, each.params)
        return
    counts = engines.tiered.runner.session.counts
    before = counts.slim_passes
    found = answers(engines.tiered, [arrival(one, greedy)])
    check_same(found[0], engines.plain_answer(one, greedy))
    tokens = len(found[0].outputs[0].token_ids)
    is_off = (one.fields.get("extra_args") or {}).get("via_sd") == "off"
    if one.one_by_one or is_off:
        assert counts.slim_passes == before
    elif tokens > 12:
        assert counts.slim_passes > before


def test_answers_to_all_of_them_at_once_are_those_of_plain_decoding(engines: Engines) -> None:
    """Log-probabilities left out: vLLM mixes up those of `logprobs` and of `logprob_token_ids` in
    one batch."""
    listed = [
        (one, greedy)
        for cases in CASES.values()
        for one in cases
        for greedy in (True, False)
        if not one.refused and not (greedy and one.random_only)
    ]
    random.Random(1).shuffle(listed)
    found = answers(engines.tiered, [arrival(*each) for each in listed])
    for each, mine in zip(listed, found, strict=True):
        try:
            check_same(mine, engines.plain_answer(*each), logprobs=False)
        except AssertionError as error:
            raise AssertionError(each) from error


def test_one_request_with_a_penalty_costs_others_nothing(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A count of the vocabulary, a copy of the longest prompt and one of its text for every row of
    a step: only rows of requests that ask for them have them."""
    sizes = []
    apply = row_metadata.apply_all_penalties

    def measured(logits: torch.Tensor, prompts: torch.Tensor, *rest: Any) -> torch.Tensor:
        sizes.append((*prompts.shape, sum(map(len, rest[-1]))))
        return apply(logits, prompts, *rest)

    monkeypatch.setattr(row_metadata, "apply_all_penalties", measured)
    monkeypatch.setattr(row_metadata, "PENALISED_AT_ONCE", 2)
    fields = {"seed": 3, "ignore_eos": True}
    long = Arrival(0, PROMPT * 4, SamplingParams(max_tokens=60, **fields))
    other = Arrival(0, list(PROMPT), SamplingParams(max_tokens=40, min_tokens=20, **fields))
    asked = SamplingParams(max_tokens=20, repetition_penalty=1.1, **fields)
    penalised = Arrival(12, list(PROMPT), asked)
    found = answers(engines.tiered, [long, other, penalised])
    for mine, one in zip(found, (long, other, penalised), strict=True):
        check_same(mine, answers(engines.plain, [replace(one, step=0)])[0])
    assert sizes
    for rows, width, outputs in sizes:
        assert rows <= 2
        assert width == len(PROMPT)
        assert outputs <= rows * (20 + WINDOW)


# --- logits processors of users -------------------------------------------------------------------


class Push(AdapterLogitsProcessor):
    """Of requests that ask for it: the sum of the output decides which token is pushed."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(
        self, params: SamplingParams
    ) -> Callable[[list[int], torch.Tensor], torch.Tensor] | None:
        if not (params.extra_args or {}).get("push"):
            return None

        def push(output: list[int], logits: torch.Tensor) -> torch.Tensor:
            logits[sum(output) % VOCABULARY] += 4.0
            return logits

        return push


class Alternate(LogitsProcessor):
    """Of the whole batch, with a memory: every other call forbids half of the vocabulary."""

    def __init__(self, *_: Any) -> None:
        self.calls = 0

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        return None

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        logits[:, self.calls % 2 :: 2] -= 5.0
        return logits


@pytest.mark.parametrize("processor", [Push, Alternate])
def test_logits_processors_of_users(processor: type[LogitsProcessor], tmp_path: Path) -> None:
    make_dense(tmp_path, seed=2, vocab_size=VOCABULARY, bigrams=0.7, whisper=0.2)
    save_character_tokenizer(tmp_path)
    given = {"logits_processors": [processor]}
    plain = TraceEngine(str(tmp_path), **PLAIN, **given)
    tiered = ViaSDEngine(str(tmp_path), NGRAM, TIERED, **COMMON, **given)
    asked = [
        SamplingParams(
            temperature=0.9 * (number % 2), seed=number, max_tokens=30, ignore_eos=True,
            extra_args={"push": number % 3 == 0}, repetition_penalty=1.0 + 0.1 * (number % 5 == 4),
        )
        for number in range(12)
    ]  # fmt: skip
    if processor is Alternate:
        asked = asked[:1]  # another batch is another sequence of calls
    found = answers(tiered, [Arrival(2 * i, list(PROMPT), one) for i, one in enumerate(asked)])
    for mine, params in zip(found, asked, strict=True):
        check_same(mine, answers(plain, [Arrival(0, list(PROMPT), params)])[0])
    with_windows = {int(window.request) for window in tiered.handed}
    pushed = {i for i in range(len(asked)) if i % 3 == 0}
    assert with_windows == (set(range(len(asked))) - pushed if processor is Push else set())
