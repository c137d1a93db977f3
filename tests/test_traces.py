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

from tiny_models import make_nvium
from trace_engine import Arrival, TraceEngine, check_against_reference, forced_thresholds
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
        max_tokens=draw(st.integers(1, 40)),
        ignore_eos=True,
        extra_args=draw(
            st.sampled_from([None, None, {"nvium_max_deferred": 0}, {"nvium_max_deferred": 3}])
        ),
    )
    return Arrival(
        step=draw(st.integers(0, 30)),
        prompt=text[:length] + tail,
        params=params,
        abort_after=draw(st.sampled_from([None, None, None, 1, 5, 20])),
    )


hazard = st.sampled_from([0.0, 0.3, 0.7, 0.95, 1.0])


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    path = tmp_path_factory.mktemp("nvium")
    reference = make_nvium(path, exit_layers=[1, 2, 3], seed=1)
    # 12 blocks of 32: two or three long sequences fit, so preemption is common.
    engine = TraceEngine(str(path), num_gpu_blocks_override=12)
    return reference, engine


@settings(
    max_examples=int(os.environ.get("NVIUM_TRACES", "220")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    trace=st.lists(arrivals(), min_size=1, max_size=8),
    hazards=st.tuples(hazard, hazard, hazard).map(list),
)
def test_logits_are_the_references(served, trace, hazards):
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
