# SPDX-License-Identifier: Apache-2.0
"""A start finds out how much memory a step needs by runs without requests: these have as many rows
of logits as steps with windows have."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from test_via_sd_traces import Served, crowd, play
from via_sd_engine import NGRAM, TARGET, ViaSDEngine

from tiny_models import make_dense
from vllm_nvium.via_sd import options as options_module
from vllm_nvium.via_sd.options import ViaSDOptions
from vllm_nvium.via_sd.runner_v1 import ViaSDModelRunnerMixin


class OfVllm:
    """vLLM's runner, as far as a run of the sampler goes."""

    max_num_reqs, max_num_tokens = 8, 100
    speculative_config: Any = "n-grams"

    def _dummy_sampler_run(self, hidden_states: torch.Tensor) -> Any:
        return tuple(torch.rand_like(hidden_states).shape), self.speculative_config


class Runner(ViaSDModelRunnerMixin, OfVllm):  # type: ignore[misc]
    def __init__(self, device: str, slim: Any, **options: Any) -> None:
        self.device, self.slim = torch.device(device), slim
        self.session: Any = SimpleNamespace(options=ViaSDOptions(drafts=4, **options))


@pytest.mark.parametrize(
    ("slim", "options", "rows"),
    [
        (object(), {"window": 10}, 8 * 11),
        (object(), {"window": 16}, 100),  # of 136, which never fit into one step
        (object(), {"window": 10, "rounds": 0}, 8 * 5),
        (object(), {"window": 10, "max_batch": 2}, 8 * 5),  # more than 8 + 2 * 10
        (object(), {"window": 10, "max_batch": 5}, 8 + 5 * 10),
        (None, {"window": 10}, 8 * 5),
    ],
)
def test_the_sampler_runs_over_the_rows_of_all_windows(
    slim: Any, options: dict[str, Any], rows: int
) -> None:
    """And the rejection sampler does not run."""
    runner = Runner("cuda", slim, **options)
    assert runner._dummy_sampler_run(torch.zeros(8, 32)) == ((rows, 32), None)
    assert runner.speculative_config == "n-grams"
    on_cpu = Runner("cpu", slim, **options)
    assert on_cpu._dummy_sampler_run(torch.zeros(8, 32)) == ((8, 32), "n-grams")


@pytest.mark.parametrize(
    ("requests", "rows"), [(50, 50 * 17), (64, 64 * 17), (256, 256 + 1024), (2000, 2 * 2000)]
)
def test_a_crowd_has_fewer_drafts_each(
    requests: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start of 1,024 requests would keep 35 GB for logits."""
    monkeypatch.setattr(OfVllm, "max_num_reqs", requests)
    monkeypatch.setattr(OfVllm, "max_num_tokens", 16384)
    assert Runner("cuda", object(), window=16)._most_sampled_rows == rows


@pytest.mark.parametrize(("most_tokens", "most_drafts"), [(48, None), (512, None), (512, 30)])
def test_no_step_has_more_rows(
    most_tokens: int, most_drafts: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if most_drafts is not None:
        monkeypatch.setattr(options_module, "MOST_DRAFTS", most_drafts)
    reference = make_dense(tmp_path, seed=1, **TARGET)
    options = {"slim": "int8", "window": 12, "rounds": 12}
    sizes = {"num_gpu_blocks_override": 60, "max_num_batched_tokens": most_tokens}
    engine = ViaSDEngine(str(tmp_path), NGRAM, options, **sizes)
    runner, full, slim = engine.runner, [], []
    sample, compute_logits = runner._sample, runner.slim.compute_logits

    def sample_and_count(logits: torch.Tensor, *args: Any) -> Any:
        full.append(len(logits))
        return sample(logits, *args)

    def compute_and_count(hidden: torch.Tensor) -> torch.Tensor:
        slim.append(len(hidden))
        return compute_logits(hidden)

    runner._sample, runner.slim.compute_logits = sample_and_count, compute_and_count
    play(Served(reference, engine), crowd(3, size=8))
    most = runner._most_sampled_rows
    requests = runner.max_num_reqs
    assert most == min(requests * 13, most_tokens, requests + (most_drafts or 1024))
    assert 2 * runner.max_num_reqs < max(full) <= most, "more than vLLM takes for the most"
    assert max(slim) <= most
