# SPDX-License-Identifier: Apache-2.0
"""N-vium on Model Runner V2 against the reference model. `test_model_runner_v2.py` runs this file
in a process of its own, whose environment makes V2 run on CPU."""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trace_engine import (
    Arrival,
    TraceEngine,
    check_against_reference,
    patch_thresholds,
    play_against_reference,
)
from trace_strategies import arrivals, hazard, nvium_params
from vllm import SamplingParams
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from tiny_models import make_nvium
from vllm_nvium.engine.stats import KEY
from vllm_nvium.model_executor.models.nvium_reference import NviumForCausalLM
from vllm_nvium.nvium.runner_v2 import NviumModelState

PROMPTS = [list(range(3, 103)), list(range(50, 57)), [9] * 40, list(range(120, 180))]


class V2Engine(TraceEngine):
    """A `TraceEngine` that also watches what only Model Runner V2 does."""

    def __init__(self, model: str, **overrides: Any) -> None:
        super().__init__(model, **overrides)
        assert isinstance(self.runner, GPUModelRunner), "these tests are for Model Runner V2"
        self.state = self.runner.model_state
        assert isinstance(self.state, NviumModelState)
        self.resumed = 0
        self.host_blocks_checked = 0
        add_request, enter = self.state.add_request, self.state.prepare_inputs

        def watch_add(req_index: int, new: Any) -> None:
            self.resumed += len(new.prefill_token_ids) > new.prompt_len
            add_request(req_index, new)

        def watch_step(*args: Any) -> dict[str, Any]:
            inputs = enter(*args)
            if "nvium_step" in inputs:
                self._check_block_table(inputs["nvium_step"].batch)
            return inputs

        self.state.add_request, self.state.prepare_inputs = watch_add, watch_step

    def _check_block_table(self, batch: Any) -> None:
        """The ids noted on the host are those on the device, and no step copies them."""
        assert batch.block_table is self.state._blocks.rows
        device = batch.block_table_device.numpy()
        for request, last in enumerate(batch.last):
            used = int(last) // 32 + 1
            noted = batch.block_table[batch.table_rows[request], :used]
            assert np.array_equal(noted, device[request, :used])
            self.host_blocks_checked += used


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, NviumForCausalLM]:
    path = tmp_path_factory.mktemp("nvium")
    return str(path), make_nvium(path, exit_layers=[1, 2, 3], seed=1)


# Asynchronous scheduling is vLLM's default for V2 on GPUs: a step is planned, and its exits drawn,
# before the host knows the last step's tokens. The CPU platform switches it off, at the end of its
# configuration check; V2 itself works with it there.
@pytest.fixture(scope="module", params=[False, True], ids=["sync", "async"])
def engine(request: Any, model: tuple[str, NviumForCausalLM]) -> Iterator[V2Engine]:
    check = CpuPlatform.check_and_update_config

    def check_and_keep(vllm_config: Any) -> None:
        check(vllm_config)
        vllm_config.scheduler_config.async_scheduling = request.param

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuPlatform, "check_and_update_config", staticmethod(check_and_keep))
        engine = V2Engine(model[0], num_gpu_blocks_override=12)
    core = engine.engine.engine_core.engine_core
    assert (core.batch_queue is not None) == request.param
    yield engine


@settings(
    max_examples=int(os.environ.get("NVIUM_V2_TRACES", "12")),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    trace=st.lists(arrivals(nvium_params(top_k=False)), min_size=1, max_size=6),
    hazards=st.tuples(hazard, hazard, hazard).map(list),
)
def test_traces(
    engine: V2Engine,
    model: tuple[str, NviumForCausalLM],
    trace: list[Arrival],
    hazards: list[float],
) -> None:
    play_against_reference(model[1], engine, trace, hazards)
    assert engine.host_blocks_checked > 0


def test_metrics_are_what_happened(engine: V2Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model state counts, and what it reports comes with the output of each step."""
    patch_thresholds(monkeypatch, [0.5, 0.5, 0.5])
    reports: list[dict[str, Any] | None] = []
    update = engine.scheduler.update_from_output

    def watch(scheduler_output: Any, output: Any) -> Any:
        reports.append(getattr(output, KEY, None))
        return update(scheduler_output, output)

    monkeypatch.setattr(engine.scheduler, "update_from_output", watch)
    # With asynchronous scheduling an aborted request leaves a step in flight, whose output comes
    # with the next one's.
    engine.run([Arrival(0, [5, 6, 7], SamplingParams(max_tokens=2, ignore_eos=True))])
    reports.clear()
    before = list(engine.state.observer.reporter.counts.exit_tokens)
    params = [
        SamplingParams(
            temperature=1.0,
            seed=i,
            max_tokens=8,
            ignore_eos=True,
            extra_args={"nvium_request_metrics": "detailed"},
        )
        for i in range(3)
    ]
    trace = [Arrival(2 * i, PROMPTS[i], params[i]) for i in range(3)]
    emitted = engine.run(trace)
    exits = [0] * 4
    for number, arrival in enumerate(trace):
        seen = emitted[str(number)]
        assert len(seen.tokens) == 8
        left_at = [seen.exits[len(arrival.prompt) - 1 + i] for i in range(8)]
        # Each answer is told of its own tokens.
        assert engine.outputs[str(number)].outputs[0].nvium_token_exits == left_at
        for exit_ in left_at:
            exits[exit_] += 1
    told = [report["counts"]["exit_tokens"] for report in reports if report is not None]
    counts = engine.state.observer.reporter.counts.exit_tokens
    assert [b - a for a, b in zip(before, counts, strict=True)] == exits
    assert [sum(each) for each in zip(*told, strict=True)] == exits
    assert sum(exits) == 24 and exits[0] > 0


def test_preempted_requests_resume(
    engine: V2Engine, model: tuple[str, NviumForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    hazards = [0.5, 0.5, 0.5]
    patch_thresholds(monkeypatch, hazards)
    # 3 blocks each at first and 5 in the end, of 11 that can be had.
    trace = [
        Arrival(
            step=0,
            prompt=[100 + i, *PROMPTS[0][:79]],
            params=SamplingParams(temperature=1.0, seed=i, max_tokens=60, ignore_eos=True),
        )
        for i in range(3)
    ]
    before = engine.resumed
    emitted = engine.run(trace)
    assert engine.resumed > before
    for number, arrival in enumerate(trace):
        compared = check_against_reference(model[1], arrival, emitted[str(number)], hazards)
        assert compared == 60


def test_next_request_completes_what_was_left_behind(
    engine: V2Engine, model: tuple[str, NviumForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(temperature=1.0, seed=0, max_tokens=60, ignore_eos=True)
    first = Arrival(step=0, prompt=[7] * 40, params=params)
    passes = []

    def watch(rows: Any, enter: Any = engine.state._catch_up.enter_rows) -> None:
        passes.append(int(rows.first[0]))
        enter(rows)

    with engine.without_bounds():
        patch_thresholds(monkeypatch, [1.0, 0.0, 0.0])
        emitted = engine.run([first])["0"]
        assert {emitted.exits[position] for position in range(40, 99)} == {0}
        patch_thresholds(monkeypatch, [0.0, 0.0, 0.0])
        second = Arrival(step=0, prompt=first.prompt + emitted.tokens, params=params)
        monkeypatch.setattr(engine.state._catch_up, "enter_rows", watch)
        emitted = engine.run([second])["0"]
    assert passes and passes[0] == 40, "the prefix-cache hit has 40..95 to complete"
    check_against_reference(model[1], second, emitted, [0.0, 0.0, 0.0])


def test_nothing_that_is_open_is_for_others_to_find(
    engine: V2Engine, model: tuple[str, NviumForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(temperature=1.0, seed=0, max_tokens=76, ignore_eos=True)
    first = Arrival(step=0, prompt=[8] * 55, params=params)
    patch_thresholds(monkeypatch, [1.0, 0.0, 0.0])
    emitted = engine.run([first])["0"]
    # 48 rows of a pass may wait, then one step goes on: of 130 positions 104 are complete.
    assert max(engine.caught_up) == 48
    second = Arrival(step=0, prompt=[*first.prompt, *emitted.tokens, 9], params=params)
    patch_thresholds(monkeypatch, [0.0, 0.0, 0.0])
    emitted = engine.run([second])["0"]
    assert engine.outputs["0"].num_cached_tokens == 96
    assert engine.caught_up[0] == 0
    check_against_reference(model[1], second, emitted, [0.0, 0.0, 0.0])


def test_mixture_law_and_logprobs(model: tuple[str, NviumForCausalLM]) -> None:
    """Greedy decoding of the mixture, with log-probabilities of tokens and prompts."""
    engine = V2Engine(model[0])
    trace = [
        Arrival(
            step=i,
            prompt=prompt,
            params=SamplingParams(
                temperature=0.0,
                max_tokens=12,
                ignore_eos=True,
                extra_args={"nvium_sampling": "mixture"},
                logprobs=3 if i in (1, 2) else None,
                prompt_logprobs=1 if i in (1, 3) else None,
            ),
        )
        for i, prompt in enumerate(PROMPTS)
    ]
    finished: dict[str, Any] = {}
    step = engine.engine.step

    def watch() -> Any:
        outputs = step()
        finished.update({output.request_id: output for output in outputs if output.finished})
        return outputs

    engine.engine.step = watch  # type: ignore[method-assign]
    engine.run(trace)
    for number, arrival in enumerate(trace):
        output = finished[str(number)]
        completion = output.outputs[0]
        tokens = arrival.prompt + list(completion.token_ids)
        with torch.no_grad():
            log_p_mix = model[1](torch.tensor([tokens]), use_cache=False).logits[0]
        predicting = log_p_mix[len(arrival.prompt) - 1 : -1]
        assert predicting.argmax(-1).tolist() == list(completion.token_ids)
        if arrival.params.logprobs is not None:
            for row, token, entry in zip(
                predicting, completion.token_ids, completion.logprobs, strict=True
            ):
                assert entry[token].logprob == pytest.approx(row[token].item(), abs=1e-4)
        if arrival.params.prompt_logprobs is not None:
            for i, entry in enumerate(output.prompt_logprobs[1:]):
                token = arrival.prompt[i + 1]
                assert entry[token].logprob == pytest.approx(log_p_mix[i, token].item(), abs=1e-4)
