# SPDX-License-Identifier: Apache-2.0
"""vLLM's scheduler with room for a window: the slim verifier writes K/V at positions that the next
step will schedule, so their blocks must be there before. Without it those writes land in blocks of
other requests."""

from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler

from vllm_nvium.via_sd.options import options_of

# An attribute of vLLM's SchedulerOutput: those of its requests that are conversations.
CONVERSATIONS = "via_sd_conversations"


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

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Tells the runner of conversations that go on (`resumable`), which have no drafts: where a
        turn ends inside what was verified, vLLM 0.32 takes tokens behind the end for computed, and
        the next turn reads other text than without drafts."""
        output = super().schedule(*args, **kwargs)
        found = {name for name in output.num_scheduled_tokens if self.requests[name].resumable}
        if found:
            setattr(output, CONVERSATIONS, found)
        return output

    @property
    def num_lookahead_tokens(self) -> int:
        # `num_spec_tokens` is the window: start-up makes it vLLM's num_speculative_tokens.
        return max(self._vllm_lookahead_tokens, self.num_spec_tokens + self._drafts)

    @num_lookahead_tokens.setter
    def num_lookahead_tokens(self, value: int) -> None:
        self._vllm_lookahead_tokens = value
        options = options_of(self.vllm_config)
        self._drafts = options.drafts if options is not None else 0
