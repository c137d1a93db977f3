# SPDX-License-Identifier: Apache-2.0
"""`vllm.v1.core.sched.scheduler.Scheduler`, in three ways. Blocks of a preempted request that were
never computed leave the prefix cache: vLLM enters blocks there while it plans a step; under
--scheduling-policy priority it may then preempt a request of the same step, and takes back the rows
but not the blocks, and whoever hits one reads what its slots held before. Blocks in which an N-vium
request has left positions open leave it too, when it gives them back. And what a model runner
reports of a step goes on to the statistics, and to the outputs of requests that asked for it. Only
engines of this package are changed."""

import functools
from collections.abc import Callable
from typing import Any

from vllm_nvium.engine.feature import running
from vllm_nvium.engine.patches import Patch
from vllm_nvium.engine.prefix_cache import evict_from, evict_open, note_complete
from vllm_nvium.engine.request_metrics import KEY, send, take_notes


def _without_uncomputed_blocks(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _preempt_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        if running(self.vllm_config) is not None:
            # Rows of the step that is being planned do not count as computed yet.
            evict_from(self, request, request.num_computed_tokens)
        return original(self, request, *args, **kwargs)

    return _preempt_request


def _without_open_blocks(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _free_request_blocks(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        method = running(self.vllm_config)
        if method is not None and method.leaves_open:
            evict_open(self, request)
        return original(self, request, *args, **kwargs)

    return _free_request_blocks


def _noting_the_report(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def update_from_output(
        self: Any, scheduler_output: Any, model_runner_output: Any, *args: Any, **kwargs: Any
    ) -> Any:
        report = getattr(model_runner_output, KEY, None)
        notes = take_notes(report)
        note_complete(self, report)
        setattr(self, KEY, report)
        outputs = original(self, scheduler_output, model_runner_output, *args, **kwargs)
        send(outputs, notes)
        return outputs

    return update_from_output


def _with_the_report(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def make_stats(self: Any, *args: Any, **kwargs: Any) -> Any:
        stats = original(self, *args, **kwargs)
        # vLLM may make statistics more than once in a step.
        if (report := getattr(self, KEY, None)) is not None:
            from vllm_nvium.engine.stats import put

            put(stats, report)
            setattr(self, KEY, None)
        return stats

    return make_stats


PATCHES = (
    Patch(
        "vllm.v1.core.sched.scheduler",
        "Scheduler",
        "_preempt_request",
        _without_uncomputed_blocks,
        without="under --scheduling-policy priority a prefix hit may read blocks never computed",
        until="vLLM enters blocks into the prefix cache once they are computed, or takes them back",
    ),
    Patch(
        "vllm.v1.core.sched.scheduler",
        "Scheduler",
        "_free_request_blocks",
        _without_open_blocks,
        without="a step of requests that find what others have left open may take very long",
        until="vLLM asks a model runner what of a request may be found by others",
    ),
    *(
        Patch(
            "vllm.v1.core.sched.scheduler",
            "Scheduler",
            method,
            wrap,
            without="what the model runner reports of a step stays in the engine's process",
            until="vLLM lets a model runner add to the statistics of a step",
        )
        for method, wrap in (
            ("update_from_output", _noting_the_report),
            ("make_stats", _with_the_report),
        )
    ),
)
