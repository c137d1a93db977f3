# SPDX-License-Identifier: Apache-2.0
"""Blocks that leave vLLM's prefix cache when a request of this package's engines gives them back:
those that were never computed, and those that are not through every layer."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

# Of a model runner's report: requests that have left positions open, id -> the leading ones that
# are through every layer, and those that have none open any more, id -> None.
COMPLETE = "complete"
# The same on vLLM's request.
ATTRIBUTE = "vllm_nvium_complete"


def note_complete(scheduler: "Scheduler", report: dict[str, Any] | None) -> None:
    """Takes what a step's report tells of its requests, and keeps it with those that are left."""
    for request_id, complete in (report.pop(COMPLETE, {}) if report else {}).items():
        if (request := scheduler.requests.get(request_id)) is None:
            continue
        # One that was preempted since then has other blocks, or none.
        if complete is None or request.num_stale_output_tokens == 0:
            setattr(request, ATTRIBUTE, complete)


def evict_open(scheduler: "Scheduler", request: "Request") -> None:
    """Before a request gives back its blocks: those with open positions are for nobody to find.
    vLLM computes such positions anew, in pieces that fit into its steps, but a step has to catch up
    on all that its requests find open, however many have left it.

    A request may be aborted while a step runs, whose report is still to come: then what the step
    computes counts as open, unless it is of the prompt, whose rows go to full depth.
    """
    complete = getattr(request, ATTRIBUTE, None)
    if complete is None:
        reported = request.num_computed_tokens - request.num_in_flight_tokens
        complete = max(reported, request.num_prompt_tokens)
    setattr(request, ATTRIBUTE, None)  # a preempted request comes back in other blocks
    if complete < request.num_computed_tokens:
        evict_from(scheduler, request, complete)


def evict_from(scheduler: "Scheduler", request: "Request", position: int) -> None:
    """Takes those blocks of a request out of the prefix cache that end behind a position."""
    manager = scheduler.kv_cache_manager
    groups = manager.get_blocks(request.request_id).blocks
    found = {
        block.block_id
        for blocks, group in zip(groups, scheduler.kv_cache_config.kv_cache_groups, strict=True)
        for block in blocks[position // group.kv_cache_spec.block_size :]
        if block.block_hash is not None
    }
    if found:
        manager.evict_blocks(found)
