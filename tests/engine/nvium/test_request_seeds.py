# SPDX-License-Identifier: Apache-2.0
"""No two requests without a seed share their exit draws, whatever ids they come with, and offline
runs repeat with the engine's `--seed`."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from vllm import SamplingParams
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from trace_engine import Arrival, TraceEngine, patch_thresholds

from tiny_models import make_nvium
from vllm_nvium.nvium import request_seeds
from vllm_nvium.nvium.options import NviumOptions
from vllm_nvium.nvium.request_seeds import RequestSeeds
from vllm_nvium.nvium.requests import NviumRequests

# Two runs of the same work: vLLM's numbers repeat, its random characters do not.
OFFLINE = ["0-1f0c9a2b", "1-00000000", "0_2-aaaaaaaa", "1_2-aaaaaaaa", "3-12345678", "10-0badcafe"]
AGAIN = [f"{name.split('-')[0]}-{number:08x}" for number, name in enumerate(OFFLINE)]


def unseeded(ids: Sequence[str], engine_seed: int = 0) -> list[int]:
    """The seeds of requests that one engine is given in this order."""
    seeds = RequestSeeds(engine_seed)
    return [seeds.seed_of(None, request_id) for request_id in ids]


@pytest.mark.parametrize(
    "ids",
    [
        ["7-1f0c9a2b", "7-00000000"],
        ["7-1f0c9a2b", "8-1f0c9a2b", "7-00000000", "8-00000000", "7-00000001"],
        ["0_7-1f0c9a2b", "1_7-1f0c9a2b", "0_7-00000000", "1_7-00000000", "7-00000000"],
        ["7-1f0c9a2b", "07-1f0c9a2b", "0_7-1f0c9a2b", "00_7-1f0c9a2b"],
        ["9" * 18 + "-1f0c9a2b", "9" * 5000 + "-1f0c9a2b", "0-1f0c9a2b", "1-1f0c9a2b"],
        ["cmpl-7-0-1f0c9a2b", "cmpl-7-0-00000000", "chatcmpl-7-1f0c9a2b", "7-1f0c9a2b"],
    ],
)
def test_requests_whose_given_ids_are_equal_draw_apart(ids: list[str]) -> None:
    assert len(set(unseeded(ids))) == len(ids)


def test_a_table_gives_equal_numbers_draws_of_their_own() -> None:
    table = NviumRequests(NviumOptions(), 0, num_exits=3)
    ids = ["7-1f0c9a2b", "7-00000000"]
    for request_id in ids:
        table.add(request_id, SamplingParams(temperature=1.0))
    together = table.sampling(ids, np.array([5, 5]), np.full(2, True), np.full(2, False))
    table.remove(ids[0])
    table.add("7-ffffffff", SamplingParams(temperature=1.0))
    later = table.sampling(
        ["7-ffffffff"], np.array([5]), np.full(1, True), np.full(1, False)
    ).thresholds
    first, second = together.thresholds
    assert not np.isin(first, second).any() and not np.isin(first, later).any()


def test_offline_requests_repeat_with_the_engines_seed() -> None:
    assert unseeded(OFFLINE) == unseeded(AGAIN)
    assert not set(unseeded(OFFLINE)) & set(unseeded(AGAIN, engine_seed=1))
    # In another order they repeat if that order does, for instance by priority.
    assert unseeded(OFFLINE[::-1]) == unseeded(AGAIN[::-1])
    # What an engine warms up with changes nothing.
    assert unseeded(["_warmup_0_", *OFFLINE])[1:] == unseeded(OFFLINE)


def test_data_parallel_engines_draw_apart(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TraceEngine(str(checkpoint))
    config = engine.runner.vllm_config
    monkeypatch.setattr(CPUModelRunner, "load_model", lambda self: None)  # it has its model
    seeds = []
    for index in range(3):
        monkeypatch.setattr(config.parallel_config, "data_parallel_index", index)
        engine.runner.load_model()
        table = engine.runner.nvium_requests
        table.add("7-1f0c9a2b", SamplingParams(temperature=1.0))
        seeds.append(table.requests["7-1f0c9a2b"].seed)
    assert len(set(seeds)) == 3
    # Alone, an engine goes by `--seed` itself.
    assert seeds[0] == unseeded(["7-1f0c9a2b"], config.model_config.seed)[0]


def test_a_named_seed_counts_alone() -> None:
    seeds = RequestSeeds(0)
    assert seeds.seed_of(5, "7-1f0c9a2b") == RequestSeeds(1).seed_of(5, "cmpl-1f0c9a2b")
    assert seeds.seed_of(None, "7-1f0c9a2b") == unseeded(["7-1f0c9a2b"])[0]


def test_a_request_that_comes_back_keeps_its_seed() -> None:
    ids = ["3-1f0c9a2b", "3-00000000", "4-1f0c9a2b", "cmpl-x-1f0c9a2b"]
    seeds = RequestSeeds(0)
    first = [seeds.seed_of(None, request_id) for request_id in ids]
    assert [seeds.seed_of(None, request_id) for request_id in reversed(ids)] == first[::-1]
    # Nor does its coming back change what others get.
    assert seeds.seed_of(None, "5-1f0c9a2b") == unseeded(["5-1f0c9a2b"])[0]


def test_no_memory_grows_with_the_number_of_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_seeds, "REMEMBERED", 4)
    seeds = RequestSeeds(0)
    ids = [f"{number}-{suffix:08x}" for number in range(20) for suffix in range(2)]
    ids += [f"cmpl-{number}-1f0c9a2b" for number in range(20)]
    given = [seeds.seed_of(None, request_id) for request_id in ids]
    # Whatever an engine keeps is one of these.
    held = [value for value in vars(seeds).values() if hasattr(value, "__len__")]
    assert all(len(value) <= 4 for value in held)
    # One that was forgotten draws anew, and apart from all others.
    assert len({*given, seeds.seed_of(None, ids[0])}) == len(given) + 1


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("nvium")
    make_nvium(path, exit_layers=[1, 2, 3], seed=5)
    return path


def exits_of(engine: TraceEngine) -> list[dict[int, int]]:
    """Exits of two requests with the same prompt, under ids as offline generation gives them."""
    params = SamplingParams(temperature=1.0, max_tokens=40, ignore_eos=True)
    emitted = engine.run([Arrival(0, [7, 8, 9], params), Arrival(0, [7, 8, 9], params)])
    return [emitted[number].exits for number in ("0", "1")]


def test_engines_repeat_but_not_what_they_gave_before(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch_thresholds(monkeypatch, [0.5, 0.5, 0.5])  # exits tell draws, and nothing else
    engine = TraceEngine(str(checkpoint))
    first, same_ids = exits_of(engine), exits_of(engine)
    assert exits_of(TraceEngine(str(checkpoint))) == first
    assert len({str(exits) for exits in first + same_ids}) == 4
