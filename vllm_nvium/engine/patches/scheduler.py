# SPDX-License-Identifier: Apache-2.0
"""`vllm.v1.core.sched.scheduler.Scheduler`: blocks of a preempted request that were never computed
leave the prefix cache. vLLM enters blocks there while it plans a step; under --scheduling-policy
priority it may then preempt a request of the same step, and takes back the rows but not the blocks.
Whoever hits one reads what its slots held before. Only engines of this package are changed."""

import functools
from collections.abc import Callable
from typing import Any

from vllm_nvium.engine.feature import running
from vllm_nvium.engine.patches import Patch


def _without_uncomputed_blocks(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _preempt_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        if running(self.vllm_config) is not None:
            manager = self.kv_cache_manager
            groups = manager.get_blocks(request.request_id).blocks
            uncomputed = {
                block.block_id
                for blocks, group in zip(groups, self.kv_cache_config.kv_cache_groups, strict=True)
                # Rows of the step that is being planned do not count as computed yet.
                for block in blocks[request.num_computed_tokens // group.kv_cache_spec.block_size :]
                if block.block_hash is not None
            }
            if uncomputed:
                manager.evict_blocks(uncomputed)
        return original(self, request, *args, **kwargs)

    return _preempt_request


PATCHES = (
    Patch(
        "vllm.v1.core.sched.scheduler",
        "Scheduler",
        "_preempt_request",
        _without_uncomputed_blocks,
        without="under --scheduling-policy priority a prefix hit may read blocks never computed",
        until="vLLM enters blocks into the prefix cache once they are computed, or takes them back",
    ),
)
