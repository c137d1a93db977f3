# SPDX-License-Identifier: Apache-2.0
"""Lossless VIA-SD on real weights: every token is that of plain decoding in the same build of
vLLM, with prefix caching, chunked prompts, preemption and mixed batches, greedy or with seeds. It
takes minutes to hours and needs checkpoints, so it runs only where they are named:

    pytest tests/engine/via_sd/test_via_sd_real_models.py --timeout 0 \\
        --via-sd-target TARGET --via-sd-prompts humaneval.jsonl \\
        [--via-sd-drafter none,ngram,DRAFT_MODEL] [--via-sd-kind int8,int4]
        [--via-sd-dtype bfloat16] [--via-sd-temperature 1] [--via-sd-at-once 8]
        [--via-sd-skip-prompts 32 --via-sd-most-prompts 32]

Plain decoding runs once for all drafters, kinds and rounds that are named.
"""

import json
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

NEW_TOKENS = 128
BLOCK = 32
# Of sampled requests: as many log-probabilities show which tokens could have been drawn.
TOP_K = 20
# Logits nearer than this may change places where sums run in another order. Those of a model in
# bfloat16 lie .125 apart between 16 and 32, and each of two may be rounded to its neighbour: plain
# decoding in smaller batches has changed places at .25.
TIE = {"float32": 1e-3, "bfloat16": 0.3}


@dataclass
class Decoding:
    """How all engines decode.

    Attributes:
        temperature: above 0, prompt i is sampled with seed i and top-k 20.
        at_once: most requests in a batch.
    """

    dtype: str
    temperature: float
    at_once: int


@dataclass
class Said:
    """Of one engine.

    Attributes:
        tokens: of every prompt.
        gaps: of every token, how far its logit, divided by the temperature and with the noise
            of its draw, is above the next one's; empty unless asked for.
        counts: `via_sd` and preemption counters of the engine.
    """

    tokens: list[list[int]]
    gaps: list[list[float]]
    counts: dict[str, float]


def generate(
    model: str,
    prompts: list[list[int]],
    options: dict[str, Any],
    how: Decoding,
    with_gaps: bool,
) -> Said:
    """Tokens of all prompts, in an engine of the caller's process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    longest = max(map(len, prompts)) + NEW_TOKENS
    mean = sum(map(len, prompts)) / len(prompts) + NEW_TOKENS
    llm = LLM(
        model,
        dtype=how.dtype,
        max_model_len=longest + 64,
        max_num_seqs=how.at_once,
        # Prompts come in pieces, beside requests that decode.
        max_num_batched_tokens=512,
        block_size=BLOCK,
        # Room for three quarters of what runs: the rest is preempted.
        num_gpu_blocks_override=max(int(0.75 * how.at_once * mean), longest + 2 * BLOCK) // BLOCK,
        enable_prefix_caching=True,
        enforce_eager=True,
        disable_log_stats=False,
        seed=0,
        **options,
    )
    sampled = {"temperature": how.temperature, "top_k": TOP_K} if how.temperature else {}
    params = [
        SamplingParams(
            **({"seed": i, **sampled} if sampled else {"temperature": 0.0}),
            max_tokens=NEW_TOKENS,
            ignore_eos=True,
            logprobs=(TOP_K if sampled else 2) if with_gaps else None,
        )
        for i in range(len(prompts))
    ]
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
    said = [output.outputs[0] for output in outputs]
    counts = {
        metric.name: metric.value
        for metric in llm.get_metrics()
        if metric.name.startswith(("vllm:via_sd", "vllm:num_preemptions", "vllm:prefix_cache_hits"))
        and hasattr(metric, "value")
    }
    vocabulary = llm.model_config.get_vocab_size()
    gaps = [
        gaps_of(each.logprobs or [], how.temperature, vocabulary, seed)
        for seed, each in enumerate(said)
    ]
    return Said([list(each.token_ids) for each in said], gaps, counts)


def gaps_of(
    steps: list[dict[int, Any]], temperature: float, vocabulary: int, seed: int
) -> list[float]:
    """Between the best and the second best token of every step of one request: vLLM takes the
    largest probability after division by exponential noise, which the request's generator draws
    over the vocabulary for each token."""
    generator = torch.Generator().manual_seed(seed)
    gaps = []
    for step in steps:
        scores = torch.tensor([each.logprob for each in step.values()])
        if temperature:
            noise = torch.empty(vocabulary).exponential_(generator=generator)
            scores = scores / temperature - noise[list(step)].log()
        best, second = scores.topk(2).values.tolist()
        gaps.append(best - second)
    return gaps


@dataclass
class Compared:
    """Texts of an engine with those of plain decoding.

    Attributes:
        equal: how many are the same, of so many texts.
        ties, wrong: of each other one its number, the first token that differs and how near the
            second best was there, in plain decoding.
    """

    equal: int
    texts: int
    ties: list[tuple[int, int, float]]
    wrong: list[tuple[int, int, float]]

    def __str__(self) -> str:
        texts = f"{self.equal} of {self.texts} equal"
        return f"{texts}; (prompt, token, gap) of ties {self.ties}, wrong {self.wrong}"


def compare(plain: Said, other: Said, how: Decoding) -> Compared:
    tie = TIE[how.dtype] / (how.temperature or 1.0)
    found = Compared(0, len(plain.tokens), [], [])
    for i, (expected, tokens) in enumerate(zip(plain.tokens, other.tokens, strict=True)):
        differ = [k for k in range(NEW_TOKENS) if expected[k] != tokens[k]]
        if not differ:
            found.equal += 1
            continue
        gap = plain.gaps[i][differ[0]]
        (found.ties if gap < tie else found.wrong).append((i, differ[0], gap))
    return found


def alone(*args: Any) -> Said:
    """`generate` in a process of its own, so that its weights are gone afterwards."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(generate, *args).result()


@pytest.fixture(scope="module")
def target(request: pytest.FixtureRequest) -> str:
    model = request.config.getoption("--via-sd-target")
    if not model:
        pytest.skip("takes long: --via-sd-target and --via-sd-prompts name what to run on")
    return str(model)


@pytest.fixture(scope="module")
def prompts(request: pytest.FixtureRequest, target: str) -> list[list[int]]:
    from transformers import AutoTokenizer

    path = request.config.getoption("--via-sd-prompts")
    if not path:
        pytest.skip("--via-sd-prompts names a file of JSON lines with `prompt`")
    tokenizer = AutoTokenizer.from_pretrained(target)
    texts = [json.loads(line)["prompt"] for line in Path(path).read_text().splitlines()]
    first = request.config.getoption("--via-sd-skip-prompts")
    texts = texts[first : first + request.config.getoption("--via-sd-most-prompts")]
    return [tokenizer(text)["input_ids"] for text in texts]


@pytest.fixture(scope="module")
def how(request: pytest.FixtureRequest) -> Decoding:
    values = (request.config.getoption(f"--via-sd-{name}") for name in ("dtype", "temperature"))
    return Decoding(*values, request.config.getoption("--via-sd-at-once"))


@pytest.fixture(scope="module")
def plain(target: str, prompts: list[list[int]], how: Decoding) -> Said:
    return alone(target, prompts, {}, how, True)


@pytest.fixture
def show(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Prints lines, whatever pytest does with output."""
    report = request.config.pluginmanager.getplugin("terminalreporter")

    def write(*lines: str) -> None:
        with capsys.disabled():
            for line in lines:
                report.write_line(line)

    return write


def test_plain_decoding_in_smaller_batches(
    show: Callable[..., None], target: str, prompts: list[list[int]], how: Decoding, plain: Said
) -> None:
    """How far plain decoding is equal to itself where requests have other company: in bfloat16 it
    has ties, as VIA-SD has."""
    if how.dtype == "float32":
        pytest.skip("has no ties")
    smaller = replace(how, at_once=max(how.at_once // 2, 1))
    found = compare(plain, alone(target, prompts, {}, smaller, False), how)
    show(f"{Path(target).name}, {how}, plain decoding in batches of {smaller.at_once}: {found}")
    assert not found.wrong


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name in ("drafter", "kind", "rounds"):
        if name in metafunc.fixturenames:
            values = metafunc.config.getoption(f"--via-sd-{name}").split(",")
            metafunc.parametrize(name, values, ids=[Path(value).name for value in values])


def test_tokens_are_those_of_plain_decoding(
    show: Callable[..., None],
    target: str,
    prompts: list[list[int]],
    how: Decoding,
    plain: Said,
    drafter: str,
    kind: str,
    rounds: str,
) -> None:
    """What a user gets is rounds `auto`; with a number the tier is in every window."""
    asked = rounds if rounds == "auto" else int(rounds)
    more = {"via_sd": True, "via_sd_rounds": asked, "via_sd_slim": kind}
    options: dict[str, Any] = {"additional_config": more, "async_scheduling": False}
    if drafter == "ngram":
        options["speculative_config"] = {
            "method": "ngram",
            "prompt_lookup_min": 2,
            "prompt_lookup_max": 4,
            "num_speculative_tokens": 4,
        }
    elif drafter != "none":
        options["speculative_config"] = {
            "method": "draft_model",
            "model": drafter,
            "num_speculative_tokens": 4,
        }
    with_tier = alone(target, prompts, options, how, False)

    found = compare(plain, with_tier, how)
    what = f"{Path(target).name}, {how}, {Path(drafter).name}, {kind}, rounds {rounds}"
    show(f"{what}: {found}", f"plain {plain.counts}", f"VIA-SD {with_tier.counts}")
    assert not found.wrong
    assert with_tier.counts["vllm:via_sd_full_passes"] > 0
    if rounds != "auto":
        assert with_tier.counts["vllm:via_sd_slim_passes"] > 0
        assert with_tier.counts["vllm:via_sd_accepted_tokens"] > 0
    assert plain.counts["vllm:num_preemptions"] > 0 or len(prompts) <= how.at_once // 2
