# SPDX-License-Identifier: Apache-2.0
"""vLLM's scheduler with room for a window: the slim verifier writes K/V at positions that the next
step will schedule, so their blocks must be there before. Without it those writes land in blocks of
other requests."""

from vllm.v1.core.sched.scheduler import Scheduler


class ViaSDScheduler(Scheduler):
    """Reserves as many KV slots ahead as a window has tokens, whatever the drafter needs.

    vLLM reserves none for drafters without a KV cache of their own (n-gram, suffix).
    """

    @property
    def num_lookahead_tokens(self) -> int:
        # `num_spec_tokens` is the window: start-up makes it vLLM's num_speculative_tokens.
        return max(self._vllm_lookahead_tokens, self.num_spec_tokens)

    @num_lookahead_tokens.setter
    def num_lookahead_tokens(self, value: int) -> None:
        self._vllm_lookahead_tokens = value
