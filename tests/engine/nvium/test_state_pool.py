# SPDX-License-Identifier: Apache-2.0
"""The pool of states: its bookkeeping against a dictionary, and traces in engines where it runs out
all the time or is not needed, exact against the reference model in both."""

import os
import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from trace_engine import (
    Arrival,
    TraceEngine,
    check_against_reference,
    patch_thresholds,
    play_against_reference,
)
from trace_strategies import TEXTS, hazard, nvium_traces
from vllm import SamplingParams

from tiny_models import make_nvium
from vllm_nvium.model_executor.layers.side_cache import SideCache
from vllm_nvium.model_executor.layers.state_pool import NONE, StatePool


def test_against_a_dictionary() -> None:
    choose = random.Random(0)
    pool, held = StatePool(num_slots=40, num_rows=12), dict[int, int]()
    for _ in range(3000):
        slots = np.array([choose.randrange(40) for _ in range(choose.randrange(1, 9))])
        if choose.random() < 0.5:
            pool.release(slots)
            for slot in slots.tolist():
                held.pop(slot, None)
        else:
            slots = np.array([slot for slot in slots.tolist() if slot not in held], dtype=np.int64)
            if len(slots) > pool.num_free:
                with pytest.raises(AssertionError, match="are free"):
                    pool.take(slots)
                continue
            rows = pool.take(slots)
            held.update(zip(slots.tolist(), rows.tolist(), strict=True))
            assert rows.tolist() == [held[slot] for slot in slots.tolist()]
        assert len(set(held.values())) == len(held), "a row for each"
        assert pool.num_free == 12 - len(held), "and none is lost"
        assert pool.rows(np.arange(40)).tolist() == [held.get(slot, NONE) for slot in range(40)]


FEW = 4


# 16 bytes per slot, where a state takes 256, of which only the first few; and all that is needed.
@pytest.fixture(scope="module", params=[0.016, 1.0], ids=["few states", "a state per slot"])
def served(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("nvium")
    reference = make_nvium(path, exit_layers=[1, 2, 3], seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SideCache, "SHARE", request.param)
        engine = TraceEngine(str(path), num_gpu_blocks_override=12)
    pool = engine.runner.model.side_cache.pool
    assert (pool is None) == (request.param == 1.0)
    if pool is not None:
        assert pool.num_free == 24
        pool.num_free = FEW
    return reference, engine


@settings(
    max_examples=int(os.environ.get("NVIUM_POOL_TRACES", "60")),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    trace=nvium_traces(),
    hazards=st.tuples(hazard, hazard, hazard).map(list),
)
def test_traces(served, trace, hazards):
    play_against_reference(*served, trace, hazards)


def test_the_pool_runs_out(served, monkeypatch):
    """How often the traces above fill it is up to their draws; this one always does."""
    reference, engine = served
    catch_up, pool = engine.runner.nvium_catch_up, engine.runner.model.side_cache.pool
    hazards, before = [0.95, 0.7, 0.3], catch_up.steps_without_room
    patch_thresholds(monkeypatch, hazards)
    trace = [
        Arrival(
            step=3 * i,
            prompt=TEXTS[i % 2][: 20 + i],
            params=SamplingParams(temperature=1.0, seed=i, max_tokens=40, ignore_eos=True),
        )
        for i in range(3)
    ]
    emitted = engine.run(trace)
    for number, arrival in enumerate(trace):
        assert check_against_reference(reference, arrival, emitted[str(number)], hazards) == 40
    if pool is None:
        assert catch_up.steps_without_room == 0
    else:
        assert catch_up.steps_without_room > before + 10
        # Whatever waits has a state, and nothing else holds one.
        assert pool.num_free + np.count_nonzero(pool.rows(np.arange(384)) != NONE) == FEW
