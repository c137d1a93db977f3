# SPDX-License-Identifier: Apache-2.0
"""vLLM's scheduler with room for a window: the slim verifier writes K/V at positions that the next
step will schedule, so their blocks must be there before. Without it those writes land in blocks of
other requests."""

from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler

from vllm_nvium.via_sd.options import options_of


class ViaSDScheduler(Scheduler):
    """Reserves as many KV slots ahead as a window has tokens, and a draft model's drafts behind the
    last of them.

    vLLM reserves none for drafters without a KV cache of their own (n-gram, suffix).
    """

    dynamic_sd_lookup: list[int] | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Without such a table vLLM pads a new request that needs one token with a window of drafts
        # `-1`, to fit CUDA graphs of V2. Here they would be verified, and cost rows.
        if self.dynamic_sd_lookup is None:
            most = self.scheduler_config.max_num_seqs
            self.dynamic_sd_lookup = [self.num_spec_tokens] * (most + 1)

    def update_draft_token_ids(self, draft_token_ids: Any) -> None:
        """A conversation that goes on (`resumable`) has no drafts: where its turn ends inside what
        was verified, vLLM 0.32 takes tokens behind the end for computed, and the next turn reads
        other text than without drafts."""
        super().update_draft_token_ids(draft_token_ids)
        for name in draft_token_ids.req_ids:
            request = self.requests.get(name)
            if request is not None and request.resumable:
                request.spec_token_ids = []

    @property
    def num_lookahead_tokens(self) -> int:
        # `num_spec_tokens` is the window: start-up makes it vLLM's num_speculative_tokens.
        return max(self._vllm_lookahead_tokens, self.num_spec_tokens + self._drafts)

    @num_lookahead_tokens.setter
    def num_lookahead_tokens(self, value: int) -> None:
        self._vllm_lookahead_tokens = value
        options = options_of(self.vllm_config)
        self._drafts = options.drafts if options is not None else 0
