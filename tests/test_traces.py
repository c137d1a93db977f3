# SPDX-License-Identifier: Apache-2.0
"""Teacher-forced traces: whatever arrives, is preempted, aborted or shares a prefix, the logits of
every emitted token are the reference model's at the exit it was scripted to leave at.
"""

import os
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm import SamplingParams

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from trace_engine import Arrival, TraceEngine, check_against_reference, forced_thresholds

from tiny_models import make_nvium
from vllm_nvium.worker import requests as nvium_requests

VOCABULARY = 256
# Prompts are cut from two long texts, so that prefix-cache hits are common.
_TEXTS = [[random.Random(t).randrange(3, VOCABULARY) for _ in range(120)] for t in range(2)]


@st.composite
def arrivals(draw: st.DrawFn) -> Arrival:
    text = draw(st.sampled_from(_TEXTS))
    length = draw(st.integers(1, 110))
    tail = draw(st.lists(st.integers(3, VOCABULARY - 1), max_size=3))
    params = SamplingParams(
        temperature=1.0,
        seed=draw(st.integers(0, 3)),
        max_tokens=draw(st.one_of(st.integers(1, 8), st.integers(30, 70))),
        ignore_eos=True,
        extra_args=draw(
            st.sampled_from([None, None, {"nvium_max_deferred": 0}, {"nvium_max_deferred": 3}])
        ),
    )
    return Arrival(
        step=draw(st.integers(0, 12)),
        prompt=text[:length] + tail,
        params=params,
        abort_after=draw(st.sampled_from([None, None, None, 1, 5, 20])),
    )


@st.composite
def traces(draw: st.DrawFn, max_size: int = 7) -> list[Arrival]:
    """Arrivals, some of which go on from what an earlier one has got."""
    # Sizes drawn evenly: lists of their own accord are mostly short, and nothing collides in them.
    size = draw(st.integers(1, max_size))
    trace = draw(st.lists(arrivals(), min_size=size, max_size=size))
    for number, arrival in enumerate(trace):
        earlier = [i for i in range(number) if trace[i].continues is None]
        if earlier and draw(st.booleans()):
            arrival.continues = draw(st.sampled_from(earlier))
            arrival.step = trace[arrival.continues].step + draw(st.integers(20, 80))
            arrival.prompt = draw(st.lists(st.integers(3, VOCABULARY - 1), min_size=1, max_size=3))
    return trace


hazard = st.sampled_from([0.0, 0.3, 0.7, 0.95, 1.0])


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    path = tmp_path_factory.mktemp("nvium")
    reference = make_nvium(path, exit_layers=[1, 2, 3], seed=1)
    # 10 blocks of 32: one long sequence or a few short ones fit, so preemption is common.
    engine = TraceEngine(str(path), num_gpu_blocks_override=10)
    return reference, engine


@settings(
    max_examples=int(os.environ.get("NVIUM_TRACES", "220")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    trace=traces(),
    hazards=st.tuples(hazard, hazard, hazard).map(list),
)
def test_logits_are_the_references(served, trace, hazards):
    play(served, trace, hazards)


def play(served, trace: list[Arrival], hazards: list[float]) -> None:
    reference, engine = served
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nvium_requests, "margin_thresholds", forced_thresholds(hazards))
        emitted = engine.run(trace)
    for number, arrival in enumerate(trace):
        seen = emitted.get(str(number))
        if seen is None:
            assert arrival.abort_after is not None
            continue
        if arrival.abort_after is None:
            assert len(seen.tokens) == arrival.params.max_tokens
        check_against_reference(reference, arrival, seen, hazards)


def forced(seed: int, max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=1.0, seed=seed, max_tokens=max_tokens, ignore_eos=True)


HAZARDS = [[0.5, 0.5, 0.5], [0.9, 0.3, 0.1], [0.95, 0.95, 0.95], [0.0, 0.9, 0.5]]


@pytest.mark.parametrize("hazards", HAZARDS)
def test_more_requests_than_fit(served, hazards):
    engine, generator = served[1], random.Random(0)
    preemptions, passes = engine.preemptions, engine.catch_up_passes
    for _ in range(2):
        trace = [
            Arrival(
                step=2 * i,
                prompt=_TEXTS[i % 2][: generator.randint(20, 60)] + [10 + i],
                params=forced(generator.randint(0, 9), generator.randint(50, 70)),
            )
            for i in range(6)
        ]
        play(served, trace, hazards)
    assert engine.preemptions - preemptions >= 4
    assert engine.catch_up_passes - passes >= 40


@pytest.mark.parametrize("hazards", HAZARDS)
def test_prefix_hits_on_positions_that_wait(served, hazards):
    """Others go on, at once and one after the other, from what a request left behind: while it
    still runs, when it has finished, and when what they share was completed by one of them."""
    engine, generator = served[1], random.Random(1)
    hits = engine.unfinished_hits
    for round_ in range(4):
        # Two tokens decoded after a block is full are enough for others to hit it.
        trace = [Arrival(0, _TEXTS[0][: 20 + round_] + [100 + round_], forced(round_, 80))]
        for step in (55, 55, 56, 70, 85, 85, 95):
            prompt = [generator.randrange(3, VOCABULARY)]
            params = forced(generator.randint(0, 9), generator.randint(2, 12))
            trace.append(Arrival(step, prompt, params, continues=0))
        play(served, trace, hazards)
    assert engine.unfinished_hits > hits
