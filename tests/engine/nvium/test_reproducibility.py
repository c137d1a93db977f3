# SPDX-License-Identifier: Apache-2.0
"""A seeded request gives the same tokens from the same exits whatever runs beside it, however its
prompt is cut, and however often it is preempted; under every kind of unembedding.
"""

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import SamplingParams

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from trace_engine import TOLERANCE, Arrival, Emitted, TraceEngine, reference_logits

from tiny_models import make_nvium
from vllm_nvium.model_executor.models.nvium_reference import NviumForCausalLM

LAWS = ["routed", "mixture"]
_RANDOM = random.Random(0)
PROMPTS = [[_RANDOM.randrange(3, 256) for _ in range(n)] for n in (60, 3, 90, 33, 64, 17)]
Engines = Callable[..., TraceEngine]


def requests(law: str) -> list[tuple[list[int], SamplingParams]]:
    """One of every kind that a seed has to reproduce; several times what one step's batch holds."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 1.0},
        {"temperature": 1.0, "max_tokens": 90},
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 1.0, "logprobs": 1},
        {"temperature": 0.0},
        {"temperature": 1.0, "extra_args": {"nvium_max_deferred": 2}},
    ]
    made = []
    for seed, (prompt, kind) in enumerate(zip(PROMPTS, kinds, strict=True)):
        extra = kind.pop("extra_args", {}) | {"nvium_sampling": law}
        fields = {"max_tokens": 40, "ignore_eos": True, "seed": seed, "extra_args": extra} | kind
        made.append((prompt, SamplingParams(**fields)))
    return made


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, NviumForCausalLM]:
    path = tmp_path_factory.mktemp("nvium")
    return path, make_nvium(path, exit_layers=[1, 2, 3], seed=5)


@pytest.fixture(scope="module")
def engines(checkpoint: tuple[Path, NviumForCausalLM]) -> Iterator[Engines]:
    made: dict[str, TraceEngine] = {}

    def engine(**overrides: Any) -> TraceEngine:
        key = repr(overrides)
        if key not in made:
            made[key] = TraceEngine(str(checkpoint[0]), **overrides)
        return made[key]

    yield engine


@pytest.fixture(scope="module")
def alone(engines: Engines) -> dict[str, list[Emitted]]:
    """What every request gives when nothing runs beside it."""
    engine = engines(max_num_batched_tokens=256, num_gpu_blocks_override=64)
    results: dict[str, list[Emitted]] = {}
    for law in LAWS:
        results[law] = [
            engine.run([Arrival(0, prompt, params)])["0"] for prompt, params in requests(law)
        ]
    return results


def exits(prompt: list[int], seen: Emitted) -> list[int]:
    """The exit of every token; rows at which a part of a prompt ended gave none."""
    return [seen.exits[len(prompt) - 1 + i] for i in range(len(seen.tokens))]


def assert_same(emitted: dict[str, Emitted], alone: list[Emitted]) -> None:
    for number, expected in enumerate(alone):
        seen, prompt = emitted[str(number)], PROMPTS[number]
        assert seen.tokens == expected.tokens, number
        # Greedy decoding of the mixture has no exit: where its token is settled depends on whether
        # the position was computed by itself.
        if not any(logits.isinf().any() for logits in expected.logits.values()):
            assert exits(prompt, seen) == exits(prompt, expected), number


@pytest.mark.parametrize("law", LAWS)
def test_alone_twice_and_by_other_ids(
    law: str, engines: Engines, alone: dict[str, list[Emitted]]
) -> None:
    engine = engines(max_num_batched_tokens=256, num_gpu_blocks_override=64)
    # Prefix-cache hits on what it left behind itself, too.
    for number, (prompt, params) in enumerate(requests(law)):
        seen = engine.run([Arrival(0, prompt, params)])["0"]
        assert seen.tokens == alone[law][number].tokens
        assert seen.exits == alone[law][number].exits


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("arrive", ["at once", "one by one", "backwards"])
def test_inside_a_batch(
    law: str, arrive: str, engines: Engines, alone: dict[str, list[Emitted]]
) -> None:
    engine = engines(max_num_batched_tokens=256, num_gpu_blocks_override=64)
    step = {
        "at once": lambda i: 0,
        "one by one": lambda i: 7 * i,
        "backwards": lambda i: 3 * (6 - i),
    }[arrive]
    made = requests(law)
    emitted = engine.run([Arrival(step(i), prompt, p) for i, (prompt, p) in enumerate(made)])
    assert_same(emitted, alone[law])


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("budget", [7, 48, 1024])
def test_however_prompts_are_cut(
    law: str, budget: int, engines: Engines, alone: dict[str, list[Emitted]]
) -> None:
    engine = engines(max_num_batched_tokens=budget, num_gpu_blocks_override=64)
    emitted = engine.run([Arrival(2 * i, *request) for i, request in enumerate(requests(law))])
    assert_same(emitted, alone[law])


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("caching", [True, False], ids=["caching", "no-caching"])
def test_after_preemption(
    law: str, caching: bool, engines: Engines, alone: dict[str, list[Emitted]]
) -> None:
    # The longest request needs six blocks of 32; all of them together need twenty.
    engine = engines(
        max_num_batched_tokens=48, num_gpu_blocks_override=10, enable_prefix_caching=caching
    )
    before = engine.preemptions
    emitted = engine.run([Arrival(0, *request) for request in requests(law)])
    assert engine.preemptions > before
    assert_same(emitted, alone[law])


@pytest.mark.parametrize("law", LAWS)
def test_after_all_were_preempted_at_once(
    law: str, engines: Engines, alone: dict[str, list[Emitted]]
) -> None:
    # What `/reset_prefix_cache` and a change of weights do: the same batch comes back, with other
    # blocks in which nothing is complete.
    engine = engines(max_num_batched_tokens=256, num_gpu_blocks_override=64)
    step, count = engine.engine.step, 0

    def step_and_reset() -> Any:
        nonlocal count
        count += 1
        if count in (9, 25):
            assert engine.engine.reset_prefix_cache(reset_running_requests=True)
        return step()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.engine, "step", step_and_reset)
        emitted = engine.run([Arrival(0, *request) for request in requests(law)])
    assert count > 25
    assert_same(emitted, alone[law])


@pytest.mark.parametrize("exit_head", ["own", "embeddings"])
@pytest.mark.parametrize("law", LAWS)
def test_exits_with_unembeddings_of_their_own(exit_head: str, law: str, tmp_path: Path) -> None:
    reference = make_nvium(tmp_path, exit_layers=[1, 3], exit_head=exit_head, seed=6)
    engine = TraceEngine(str(tmp_path), num_gpu_blocks_override=64)
    made = requests(law)
    for together in (True, False):
        runs = [made] if together else [[request] for request in made[:2]]
        for run in runs:
            emitted = engine.run([Arrival(0, *request) for request in run])
            for number, (prompt, params) in enumerate(run):
                check_logits(reference, prompt, params, emitted[str(number)], law)


def check_logits(
    reference: NviumForCausalLM, prompt: list[int], params: SamplingParams, seen: Emitted, law: str
) -> None:
    output, heads = reference_logits(reference, prompt + seen.tokens)
    one_head = law == "routed" or (params.temperature == 1.0 and params.logprobs is None)
    for i, token in enumerate(seen.tokens):
        position = len(prompt) - 1 + i
        got, mixture = seen.logits[position], output.logits[0, position]
        if got.isinf().any():  # the argmax of the mixture was settled before the last head
            assert mixture.max() - mixture[token] < TOLERANCE
            continue
        if not one_head:  # logits of the mixture are its log-probabilities plus a constant
            got = torch.log_softmax(got, dim=-1)
        expected = heads[position, seen.exits[position]] if one_head else mixture
        torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)
    assert len(set(seen.exits.values())) > 1 or not one_head
