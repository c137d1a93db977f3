# SPDX-License-Identifier: Apache-2.0
"""Structured outputs under the paper's rule of VIA-SD: whatever it keeps without asking the full
model, an answer parses.
"""

import json
import os
import random
import re
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from trace_engine import Arrival
from via_sd_engine import NGRAM, ViaSDEngine

from tiny_models import make_dense, save_character_tokenizer

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["anna", "bob"]}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
STRUCTURES: dict[str, dict[str, Any]] = {
    "choice": {"choice": ["abcabcabd", "abcabcabcabe", "xyz"]},
    "regex": {"regex": "(ab|cd){6,12}x"},
    "json": {"json": SCHEMA},
    "grammar": {"grammar": 'root ::= ("yes " | "no "){3,8} "end"'},
}
# All drafts are kept; all but the likeliest are drawn again; some of each and the full model's.
THRESHOLDS = [(0.0, 0.0), (1.0, 0.0), (0.9, 0.5)]
TEMPERATURES = [0.0, 1.0]
MOST = 60


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> ViaSDEngine:
    path = tmp_path_factory.mktemp("characters")
    # The vocabulary is that of the tokenizer: no token is without a character.
    make_dense(path, seed=2, vocab_size=98, bigrams=0.7, whisper=0.2)
    save_character_tokenizer(path)
    options = {"mask": "2", "window": 8, "rounds": 2, "mode": "paper"}
    return ViaSDEngine(
        str(path),
        NGRAM,
        options,
        num_gpu_blocks_override=100,
        max_num_seqs=8,
        structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
    )


def check_answer(kind: str, text: str, reason: str) -> None:
    """It is complete; JSON may be cut by the limit, because white space and numbers have none."""
    if kind == "json":
        whole = [f'{{"name":"{name}","age":0}}' for name in ("anna", "bob")]
        # What is cut goes on as the end of one of these.
        ends = [""] if reason == "stop" else [each[i:] for each in whole for i in range(len(each))]
        assert reason == "stop" or len(text) == MOST
        assert any(is_of_the_schema(text + end) for end in ends), text
        return
    assert reason == "stop"
    if kind == "choice":
        assert text in STRUCTURES[kind]["choice"]
    else:
        pattern = {"regex": "(ab|cd){6,12}x", "grammar": "(yes |no ){3,8}end"}[kind]
        assert re.fullmatch(pattern, text), text


def is_of_the_schema(text: str) -> bool:
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return (
        isinstance(found, dict)
        and found.keys() == {"name", "age"}
        and found["name"] in ("anna", "bob")
        and isinstance(found["age"], int)
    )


@pytest.mark.parametrize("kind", STRUCTURES)
def test_answers_under_the_papers_rule_parse(engine: ViaSDEngine, kind: str) -> None:
    generator = random.Random(0)
    # Of what answers are made of, so that n-grams propose what the structure forbids, too.
    letters = [3 + ord(letter) - 32 for letter in 'abcdxyz {}":,annabobnameage0123yes no end']
    params = [
        SamplingParams(
            temperature=temperature, max_tokens=MOST,
            structured_outputs=StructuredOutputsParams(**STRUCTURES[kind]),
            extra_args={"via_sd_accept": accept, "via_sd_escalate": escalate},
        )
        for accept, escalate in THRESHOLDS
        for temperature in TEMPERATURES
        for _ in range(4)
    ]  # fmt: skip
    tiers = list(engine.runner.session.counts.tiers)
    engine.run([Arrival(0, generator.choices(letters, k=40), each) for each in params])
    complete = 0
    for number in range(len(params)):
        answer = engine.outputs[str(number)].outputs[0]
        check_answer(kind, answer.text, answer.finish_reason)
        complete += answer.finish_reason == "stop"
    assert complete
    # Windows had tokens of it.
    assert sum(engine.runner.session.counts.tiers) > sum(tiers)
