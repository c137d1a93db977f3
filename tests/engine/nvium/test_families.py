# SPDX-License-Identifier: Apache-2.0
"""Teacher-forced traces of N-vium models of every family, those with sliding windows included: the
logits of every emitted token are the reference model's at the exit it was scripted to leave at.
Sequences are several windows long, and positions wait for longer than a window.
"""

import os
import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from trace_engine import Arrival, TraceEngine, play_against_reference
from trace_strategies import TEXTS, VOCABULARY, hazard, nvium_traces

from tiny_models import dense_config, make_nvium

EVERYWHERE = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}
TIED = {"tie_word_embeddings": True}
# Kind of the parent, its fields, and those of the exits.
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "mistral with a window": ("mistral", {"sliding_window": 16}, {}),
    "qwen2": ("qwen2", {}, {"exit_head": "embeddings"}),
    "qwen2 with a window": ("qwen2", TIED | EVERYWHERE, {}),
    "qwen3": ("qwen3", TIED | {"hidden_size": 96}, {}),
    "experts": ("qwen3_moe", {}, {}),
    "gemma2": ("gemma2", TIED, {}),
    "gemma3": ("gemma3", {}, {}),
    # vLLM takes a tensor `exits.0.lm_head.weight` for a sign that nothing is tied.
    "gemma3 with unembeddings of its exits": ("gemma3", TIED, {"exit_head": "own"}),
}


@pytest.fixture(scope="module", params=MODELS)
def served(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("nvium")
    kind, fields, exits = MODELS[request.param]
    parent = dense_config(kind, **fields)
    reference = make_nvium(path, exit_layers=[1, 2, 3], seed=1, parent=parent, **exits)
    # vLLM keeps its groups of ranks for the next engine of a process, and those of a dense model
    # have none for experts.
    cleanup_dist_env_and_memory()
    # 10 blocks of 32: one long sequence or a few short ones fit, so preemption is common.
    return reference, TraceEngine(str(path), num_gpu_blocks_override=10)


def forced(seed: int, max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=1.0, seed=seed, max_tokens=max_tokens, ignore_eos=True)


@settings(
    max_examples=int(os.environ.get("NVIUM_TRACES", "40")),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    trace=nvium_traces(),
    hazards=st.tuples(hazard, hazard, hazard).map(list),
    resets=st.sampled_from([(), (), (15,), (40, 41)]),
    chunk=st.sampled_from([0, 0, 1, 7]),
)
def test_logits_are_the_references(served, trace, hazards, resets, chunk):
    config = served[1].scheduler.scheduler_config
    config.long_prefill_token_threshold = chunk
    try:
        play_against_reference(*served, trace, hazards, resets)
    finally:
        config.long_prefill_token_threshold = 0


@pytest.mark.parametrize("hazards", [[0.5, 0.5, 0.5], [0.9, 0.3, 0.1], [0.95, 0.95, 0.95]])
def test_more_requests_than_fit(served, hazards):
    engine, generator = served[1], random.Random(0)
    preemptions, passes = engine.preemptions, engine.catch_up_passes
    trace = [
        Arrival(
            step=2 * i,
            prompt=TEXTS[i % 2][: generator.randint(20, 60)] + [10 + i],
            params=forced(generator.randint(0, 9), generator.randint(50, 70)),
        )
        for i in range(6)
    ]
    play_against_reference(*served, trace, hazards)
    assert engine.preemptions > preemptions
    assert engine.catch_up_passes - passes >= 20


@pytest.mark.parametrize("hazards", [[0.9, 0.3, 0.1], [0.95, 0.95, 0.95]])
def test_prefix_hits_on_positions_that_wait(served, hazards):
    engine, generator = served[1], random.Random(1)
    hits = engine.unfinished_hits
    for round_ in range(2):
        trace = [Arrival(0, TEXTS[0][: 20 + round_] + [100 + round_], forced(round_, 80))]
        for step in (55, 55, 56, 70, 85, 85, 95):
            prompt = [generator.randrange(3, VOCABULARY)]
            params = forced(generator.randint(0, 9), generator.randint(2, 12))
            trace.append(Arrival(step, prompt, params, continues=0))
        play_against_reference(*served, trace, hazards)
    assert engine.unfinished_hits > hits


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_several_windows_wait_and_are_caught_up_at_once(served, depth):
    """Nobody goes further than one exit, until the prompt of another makes a full pass."""
    engine = served[1]
    passes = engine.catch_up_passes
    trace = [
        Arrival(0, TEXTS[1][:8], forced(1, 70)),
        Arrival(60, TEXTS[0][:5], forced(2, 20)),
    ]
    play_against_reference(*served, trace, [float(k == depth) for k in range(3)])
    assert engine.catch_up_passes > passes


def test_one_block_table_holds_all_layers(served):
    groups = served[1].runner.kv_cache_config.kv_cache_groups
    assert len(groups) == 1
    assert len(groups[0].layer_names) == 5  # four layers and the side cache
