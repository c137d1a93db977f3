# SPDX-License-Identifier: Apache-2.0
"""An engine inside the test's process, driven step by step, whose logits are held against the
reference model. Both model runners are driven by the same code.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import vllm.envs
from vllm import EngineArgs, RequestOutput, SamplingParams
from vllm.v1.engine.llm_engine import LLMEngine

from vllm_nvium.model_executor.models.nvium_reference import NviumForCausalLM
from vllm_nvium.model_executor.nvium import policy
from vllm_nvium.model_executor.nvium.completion import CatchUp
from vllm_nvium.model_executor.nvium.step import Step
from vllm_nvium.model_executor.ops.draws import request_seed, uniform_draws
from vllm_nvium.model_executor.rows import Rows
from vllm_nvium.nvium.requests import UNLIMITED, NviumRequests

TOLERANCE = 1e-4
# How long a trace waits for other threads, all its steps together: a minute.
IDLE_SECONDS, MOST_IDLE = 0.01, 6000


@dataclass
class Arrival:
    """One request of a trace.

    Attributes:
        step: engine step before which it is added.
        abort_after: steps after arrival at which it is aborted; None to let it finish.
        continues: number of an arrival whose tokens so far come before `prompt`, so that this one
            hits blocks in which positions wait. `prompt` is the whole once it has arrived.
        take: of an arrival that is continued, so many tokens of its prompt and answer.
    """

    step: int
    prompt: list[int]
    params: SamplingParams
    abort_after: int | None = None
    continues: int | None = None
    take: int = 180
    priority: int = 0


@dataclass
class Emitted:
    """What the engine computed for one request: by position of the token that was sampled from."""

    logits: dict[int, torch.Tensor] = field(default_factory=dict)
    exits: dict[int, int] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)


def forced_thresholds(hazards: list[float]) -> Callable[..., np.ndarray]:
    """A stand-in for `margin_thresholds` that ignores the routers: exits follow a random script."""

    def thresholds(seeds: np.ndarray, positions: np.ndarray, num_exits: int) -> np.ndarray:
        leave = uniform_draws(seeds, positions, num_exits) < np.asarray(hazards)
        return np.where(leave, -np.inf, np.inf)

    return thresholds


def scripted_exit(seed: int, position: int, hazards: list[float]) -> int:
    """The exit that `forced_thresholds` makes a token leave at."""
    seeds = np.array([request_seed(seed, "", 0)], dtype=np.uint64)
    draws = uniform_draws(seeds, np.array([position]), len(hazards))[0]
    leaving = np.flatnonzero(draws < np.asarray(hazards))
    return int(leaving[0]) if len(leaving) else len(hazards)


class TraceEngine:
    """An `LLMEngine` in this process, with a recorder behind the model's `compute_logits`."""

    def __init__(self, model: str, **overrides: Any) -> None:
        args = {
            "model": model,
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 256,
            "block_size": 32,
            "max_num_seqs": 6,
            "max_num_batched_tokens": 48,
            "enable_prefix_caching": True,
            "enable_chunked_prefill": True,
            "async_scheduling": False,
            "seed": 0,
            "disable_log_stats": True,
        }
        # Read anew: vLLM remembers its environment once an engine has run in this process.
        vllm.envs.disable_envs_cache()
        with patch.dict(os.environ, {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}):
            self.engine = LLMEngine.from_engine_args(EngineArgs(**(args | overrides)))
        core = self.engine.engine_core.engine_core
        self.scheduler = core.scheduler
        self.runner = core.model_executor.driver_worker.worker.model_runner
        self.emitted: dict[str, Emitted] = {}
        # The last output of every request, and the segments run in every step.
        self.outputs: dict[str, RequestOutput] = {}
        self.depths: list[int] = []
        # Of every step, rows that waited for its second segment.
        self.caught_up: list[int] = []
        # What happened since the engine was made: a trace in which none of it happens tests little.
        self.preemptions = 0
        self.catch_up_passes = 0
        self.unfinished_hits = 0
        self.rising_marks = 0
        self._watched: CatchUp | None = None
        self._is_unbounded = False
        model_ = self.runner.model
        compute_logits, run = model_.compute_logits, model_.forward
        preempt = self.scheduler._preempt_request
        self._step: Any = None

        def count_preemption(*args: Any, **kwargs: Any) -> Any:
            self.preemptions += 1
            return preempt(*args, **kwargs)

        self.scheduler._preempt_request = count_preemption

        def record_step(*args: Any, **kwargs: Any) -> torch.Tensor:
            step = self._step = kwargs.get("nvium_step")
            if step is None:
                return run(*args, **kwargs)
            self._watch(step)
            output = run(*args, **kwargs)
            self.depths.append(step.depth)
            num_rows = step.batch.num_rows
            self.caught_up.append([*step.rows_run, num_rows][1] - num_rows)
            return output

        def record(hidden_states: torch.Tensor) -> torch.Tensor:
            logits = compute_logits(hidden_states)
            if self._step is not None:
                self._record(logits)
                self._step = None
            return logits

        model_.compute_logits, model_.forward = record, record_step

    def _watch(self, step: Step) -> None:
        """Counts passes that more rows joined, and prefix hits on positions not yet complete."""
        batch, catch_up = step.batch, step.catch_up
        if catch_up is not self._watched:
            self._watched, enter = catch_up, catch_up.enter_rows

            def count_pass(rows: Rows) -> None:
                self.catch_up_passes += 1
                enter(rows)

            catch_up.enter_rows = count_pass
        for request in np.flatnonzero((batch.complete == 0) & (batch.first > 0)):
            positions = np.arange(batch.first[request])
            sequence = np.full(len(positions), request)
            slots = batch.slots_of(sequence, positions, catch_up.block_size)
            marks = catch_up.side_cache.marks[slots]
            self.unfinished_hits += bool((marks < catch_up.num_segments).any())
            self.rising_marks += bool((np.diff(marks.astype(int)) > 0).any())

    def _record(self, logits: torch.Tensor) -> None:
        step = self._step
        assert len(logits) == step.batch.num_requests
        for row, request_id in enumerate(step.request_ids):
            if self._is_for_prompt_logprobs(row, request_id):
                continue
            seen = self.emitted.setdefault(_public(request_id), Emitted())
            position = int(step.batch.last[row])
            seen.logits[position] = logits[row].clone()
            seen.exits[position] = int(step.exits[row])

    def _is_for_prompt_logprobs(self, row: int, request_id: str) -> bool:
        """Whether the newest row of a prompt that goes on is nothing but one of its prompt rows."""
        requests = self.table.requests
        return self._step.sampling.mixture[row] and not requests[request_id].mixture

    @property
    def table(self) -> NviumRequests:
        """Of an N-vium model."""
        return getattr(self.runner, "nvium_requests", None) or self.runner.model_state.requests

    @contextmanager
    def without_bounds(self) -> Iterator[None]:
        """Lets as much wait as there is room for, also in the prefix cache: catch-up has to be
        right whatever its amount."""
        with pytest.MonkeyPatch.context() as bounds:
            bounds.setattr(self.table, "max_rows", UNLIMITED)
            bounds.setattr(self.table, "stopped", lambda: None)
            bounds.setattr(self, "_is_unbounded", True)
            yield
        # What was left there is for nobody to find.
        assert self.engine.reset_prefix_cache()

    def open_in_prefix_cache(self, unused: bool = False) -> int:
        """Positions that others could find there and that are not through every layer.

        Args:
            unused: only in blocks that no request holds.
        """
        found = 0
        pool = self.scheduler.kv_cache_manager.block_pool
        catch_up = self._watched
        for block in pool.blocks:
            if unused and block.ref_cnt:
                continue
            if block.block_hash is not None and catch_up is not None:
                first = block.block_id * catch_up.block_size
                marks = catch_up.side_cache.marks[first : first + catch_up.block_size]
                found += int((marks != catch_up.num_segments).sum())
        return found

    def run(
        self, trace: list[Arrival], max_steps: int = 2000, resets: Sequence[int] = ()
    ) -> dict[str, Emitted]:
        """Plays a trace to its end and returns what was emitted for every request.

        Args:
            resets: steps before which the prefix cache is emptied, while requests run.
        """
        self.emitted, self.outputs, self.depths, self.caught_up = {}, {}, [], []
        waiting = sorted(enumerate(trace), key=lambda item: item[1].step)
        abort_at: dict[int, list[str]] = {}
        step = idle = 0
        while step < max_steps:
            while waiting and waiting[0][1].step <= step:
                number, arrival = waiting.pop(0)
                request_id = str(number)
                if arrival.continues is not None:
                    before, so_far = (
                        trace[arrival.continues],
                        self.emitted.get(str(arrival.continues), Emitted()),
                    )
                    arrival.prompt = (before.prompt + so_far.tokens)[
                        : arrival.take
                    ] + arrival.prompt
                self.engine.add_request(
                    request_id,
                    {"prompt_token_ids": arrival.prompt},
                    arrival.params,
                    priority=arrival.priority,
                )
                if arrival.abort_after is not None:
                    abort_at.setdefault(step + arrival.abort_after, []).append(request_id)
            self.engine.abort_request(abort_at.pop(step, []))
            if not waiting and not abort_at and not self.engine.has_unfinished_requests():
                assert self._is_unbounded or not self.open_in_prefix_cache()
                return self.emitted
            if step in resets:
                assert self.engine.reset_prefix_cache(reset_running_requests=True)
            outputs = self.engine.step()
            step += 1
            waits = self.engine.has_unfinished_requests() and not self.scheduler.running
            if not outputs and waits and idle < MOST_IDLE:
                # A grammar is being compiled in another thread: such steps are no progress.
                time.sleep(IDLE_SECONDS)
                step, idle = step - 1, idle + 1
            for output in outputs:
                seen = self.emitted.setdefault(output.request_id, Emitted())
                seen.tokens = list(output.outputs[0].token_ids)
                self.outputs[output.request_id] = output
        raise AssertionError(f"the trace did not end within {max_steps} steps")


def _public(request_id: str) -> str:
    """vLLM adds a random suffix to the ids that it is given."""
    return request_id.rsplit("-", 1)[0] if "-" in request_id else request_id


def reference_logits(reference: NviumForCausalLM, tokens: list[int]) -> tuple[Any, torch.Tensor]:
    """The reference's output and the raw logits of every head [T, N, V] on a whole sequence."""
    with torch.no_grad():
        output = reference(torch.tensor([tokens]), use_cache=False, output_head_logits=True)
    return output, output.head_logits[0].float()


def check_against_reference(
    reference: NviumForCausalLM, arrival: Arrival, emitted: Emitted, hazards: list[float]
) -> int:
    """Every emitted token's logits equal the reference's at the exit it was scripted to leave at.

    Returns:
        how many positions were compared.
    """
    tokens = arrival.prompt + emitted.tokens
    if not emitted.tokens:
        return 0
    _, heads = reference_logits(reference, tokens)
    compared = 0
    for i in range(len(emitted.tokens)):
        position = len(arrival.prompt) + i - 1
        exit_ = scripted_exit(arrival.params.seed, position, hazards)
        assert emitted.exits[position] == exit_
        difference = (emitted.logits[position] - heads[position, exit_]).abs().max()
        assert difference < TOLERANCE, (
            f"position {position}, exit {exit_}: logits differ by {difference}"
        )
        compared += 1
    return compared


def play_against_reference(
    reference: NviumForCausalLM,
    engine: TraceEngine,
    trace: list[Arrival],
    hazards: list[float],
    resets: Sequence[int] = (),
) -> None:
    """Plays a trace to its end; every request got its tokens, and they are the reference's."""
    with pytest.MonkeyPatch.context() as patch:
        patch_thresholds(patch, hazards)
        emitted = engine.run(trace, resets=resets)
    for number, arrival in enumerate(trace):
        seen = emitted.get(str(number))
        if seen is None:
            assert arrival.abort_after is not None
            continue
        if arrival.abort_after is None:
            assert len(seen.tokens) == arrival.params.max_tokens
        check_against_reference(reference, arrival, seen, hazards)


def patch_thresholds(monkeypatch: Any, hazards: list[float]) -> None:
    monkeypatch.setattr(policy, "margin_thresholds", forced_thresholds(hazards))
