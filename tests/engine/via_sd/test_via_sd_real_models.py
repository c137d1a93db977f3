# SPDX-License-Identifier: Apache-2.0
"""Greedy lossless VIA-SD on real weights in float32: every token is that of plain decoding in the
same build of vLLM, with prefix caching, chunked prompts, preemption and mixed batches. It takes
minutes to hours and needs checkpoints, so it runs only where they are named:

    pytest tests/engine/via_sd/test_via_sd_real_models.py --timeout 0 \\
        --via-sd-target TARGET --via-sd-prompts humaneval.jsonl \\
        [--via-sd-drafter none,ngram,DRAFT_MODEL] [--via-sd-kind int8,int4]
        [--via-sd-skip-prompts 32 --via-sd-most-prompts 32]

Plain decoding runs once for all drafters, kinds and rounds that are named.
"""

import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

NEW_TOKENS = 128
AT_ONCE = 32
BLOCK = 32
# Logits nearer than this may change places where float32 sums run in another order.
TIE = 1e-3


@dataclass
class Said:
    """Of one engine.

    Attributes:
        tokens: of every prompt.
        gaps: of every token, how far its log-probability is above the next one's; empty unless
            asked for.
        counts: `via_sd` and preemption counters of the engine.
    """

    tokens: list[list[int]]
    gaps: list[list[float]]
    counts: dict[str, float]


def generate(
    model: str, prompts: list[list[int]], options: dict[str, Any], logprobs: int | None
) -> Said:
    """Greedy tokens of all prompts, in an engine of the caller's process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    longest = max(map(len, prompts)) + NEW_TOKENS
    mean = sum(map(len, prompts)) / len(prompts) + NEW_TOKENS
    llm = LLM(
        model,
        dtype="float32",
        max_model_len=longest + 64,
        max_num_seqs=AT_ONCE,
        # Prompts come in pieces, beside requests that decode.
        max_num_batched_tokens=512,
        block_size=BLOCK,
        # Room for three quarters of what runs: the rest is preempted.
        num_gpu_blocks_override=int(0.75 * AT_ONCE * mean / BLOCK),
        enable_prefix_caching=True,
        enforce_eager=True,
        disable_log_stats=False,
        seed=0,
        **options,
    )
    params = SamplingParams(
        temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=logprobs
    )
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
    said = [output.outputs[0] for output in outputs]
    counts = {
        metric.name: metric.value
        for metric in llm.get_metrics()
        if metric.name.startswith(("vllm:via_sd", "vllm:num_preemptions", "vllm:prefix_cache_hits"))
        and hasattr(metric, "value")
    }
    return Said(
        [list(each.token_ids) for each in said],
        [[gap_of(step) for step in each.logprobs or []] for each in said],
        counts,
    )


def gap_of(step: Any) -> float:
    """Between the best and the second best token of one step."""
    best, second = sorted((each.logprob for each in step.values()), reverse=True)[:2]
    return float(best - second)


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
def plain(target: str, prompts: list[list[int]]) -> Said:
    return alone(target, prompts, {}, 2)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name in ("drafter", "kind", "rounds"):
        if name in metafunc.fixturenames:
            values = metafunc.config.getoption(f"--via-sd-{name}").split(",")
            metafunc.parametrize(name, values, ids=[Path(value).name for value in values])


def test_greedy_tokens_are_those_of_plain_decoding(
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
    target: str,
    prompts: list[list[int]],
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
    with_tier = alone(target, prompts, options, None)

    equal, ties, wrong = 0, [], []
    for i, (expected, found) in enumerate(zip(plain.tokens, with_tier.tokens, strict=True)):
        differ = [k for k in range(NEW_TOKENS) if expected[k] != found[k]]
        if not differ:
            equal += 1
        elif plain.gaps[i][differ[0]] < TIE:
            ties.append((i, differ[0], plain.gaps[i][differ[0]]))
        else:
            wrong.append((i, differ[0], plain.gaps[i][differ[0]]))
    report = request.config.pluginmanager.getplugin("terminalreporter")
    with capsys.disabled():
        for line in (
            f"{Path(target).name}, {Path(drafter).name}, {kind}, rounds {rounds}: "
            f"{equal} of {len(prompts)} equal; (prompt, token, gap) of ties {ties}, wrong {wrong}",
            f"plain {plain.counts}",
            f"VIA-SD {with_tier.counts}",
        ):
            report.write_line(line)
    assert not wrong
    assert with_tier.counts["vllm:via_sd_full_passes"] > 0
    if rounds != "auto":
        assert with_tier.counts["vllm:via_sd_slim_passes"] > 0
        assert with_tier.counts["vllm:via_sd_accepted_tokens"] > 0
    assert plain.counts["vllm:num_preemptions"] > 0 or len(prompts) <= AT_ONCE // 2
