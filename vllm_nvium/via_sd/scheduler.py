# SPDX-License-Identifier: Apache-2.0
"""vLLM's scheduler with room for a window: the slim verifier writes K/V at positions that the next
step will schedule, so their blocks must be there before. Without it those writes land in blocks of
other requests. And with room beside windows: what they take of a step is bounded."""

from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from vllm_nvium.via_sd.options import options_of
from vllm_nvium.via_sd.step_budget import Admission, fair_shares, room_for_drafts

if TYPE_CHECKING:
    from vllm.v1.outputs import DraftTokenIds

# Attributes of vLLM's SchedulerOutput: those of its requests that are conversations, and how many
# tokens the drafts of all requests may take, where that is less than they might want.
CONVERSATIONS, ROOM = "via_sd_conversations", "via_sd_room"

# Of requests whose prompts may begin in the next step; a grammar may be ready by then.
READY = (
    RequestStatus.WAITING,
    RequestStatus.PREEMPTED,
    RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR,
)


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
        speculative = self.vllm_config.speculative_config
        assert speculative is not None
        # Rows of a step that a draft model adds for each request.
        self._drafter_slots = speculative.max_num_new_slots_for_drafting
        self._admission = Admission()
        options = options_of(self.vllm_config)
        assert options is not None
        self._most_drafts = options.most_drafts(self.scheduler_config.max_num_seqs)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Shortens drafts that the step has no room for and tells the runner how much room there
        is, and of conversations that go on (`resumable`), which have no drafts: where a turn ends
        inside what was verified, vLLM 0.32 takes tokens behind the end for computed, and the next
        turn reads other text than without drafts."""
        waiting = self._needs_of_waiting() if self._admission.is_open(len(self.running)) else 0
        room = self._fit_drafts(waiting) if self.running else self._most_drafts
        output = super().schedule(*args, **kwargs)
        has_begun = bool(output.scheduled_new_reqs or output.scheduled_cached_reqs.resumed_req_ids)
        if waiting or has_begun:
            has_left = output.total_num_scheduled_tokens < self._budget
            self._admission.observe(len(self.running), has_begun or not has_left)
        if room < len(self.running) * self.num_spec_tokens:
            setattr(output, ROOM, room)
        found = {name for name in output.num_scheduled_tokens if self.requests[name].resumable}
        if found:
            setattr(output, CONVERSATIONS, found)
        return output

    @property
    def _budget(self) -> int:
        return min(
            self.max_num_scheduled_tokens,
            self.scheduler_config.max_num_batched_tokens - self._drafter_slots * len(self.running),
        )

    def _fit_drafts(self, waiting: int) -> int:
        """vLLM serves running requests one after the other with all of their drafts, and those for
        whom nothing is left have no token in the step, which plain decoding never does to them. One
        with a thinking budget is taken for new then, and may be told anew to end its thought.

        Args:
            waiting: tokens of prompts that may begin.

        Returns:
            tokens that drafts may take.
        """
        room = room_for_drafts(
            self._budget,
            self._needs(),
            waiting,
            1 + self._drafter_slots,
            self.scheduler_config.enable_chunked_prefill,
        )
        room = min(room, self._most_drafts)
        drafted = [request for request in self.running if request.spec_token_ids]
        counts = [len(request.spec_token_ids) for request in drafted]
        if sum(counts) > room:
            for request, count in zip(drafted, fair_shares(counts, room), strict=True):
                request.spec_token_ids = request.spec_token_ids[:count]
        return room

    def _needs(self) -> list[int]:
        """Tokens that each running request needs in this step, without drafts."""
        config = self.scheduler_config
        most = config.long_prefill_token_threshold or config.max_num_batched_tokens
        if config.long_prefill_token_threshold_adaptive:
            most = max(most, config.max_num_batched_tokens // len(self.running))
        return [min(each.num_tokens - each.num_computed_tokens, most) for each in self.running]

    def _needs_of_waiting(self) -> int:
        """Tokens of the prompts that may begin in this step; counted until there are enough."""
        places = self.max_num_active_reqs - len(self.running) - self.num_waiting_for_streaming_input
        enough, needs = self._budget - len(self.running), 0
        ready = (
            request
            for request in chain(self.kv_holding_waiting, self.waiting)
            if request.status in READY
        )
        for request in islice(ready, max(places, 0)):
            need = request.num_tokens - request.num_computed_tokens + self._drafter_slots
            if not self.scheduler_config.enable_chunked_prefill and needs + need > enough:
                break  # it is computed at once, and does not fit into this step
            needs += need
            if needs >= enough:
                break
        return needs

    def update_draft_token_ids(self, draft_token_ids: "DraftTokenIds") -> None:
        """A structured output has no drafts from the first token on that may end it: the full model
        says that token itself, in the same step. Where the text goes on behind it (`ignore_eos`),
        vLLM shows a grammar all new tokens at once, and guidance takes none behind the end: the
        request would end with an error."""
        super().update_draft_token_ids(draft_token_ids)
        for name in draft_token_ids.req_ids:
            request = self.requests.get(name)
            if request is None or not request.use_structured_output:
                continue
            assert request.sampling_params is not None
            # With `ignore_eos`, too, it has the token that ends a text.
            ends = request.sampling_params.all_stop_token_ids
            drafts = request.spec_token_ids
            first = next((place for place, token in enumerate(drafts) if token in ends), None)
            request.spec_token_ids = drafts[:first]

    @property
    def num_lookahead_tokens(self) -> int:
        # `num_spec_tokens` is the window: start-up makes it vLLM's num_speculative_tokens.
        return max(self._vllm_lookahead_tokens, self.num_spec_tokens + self._drafts)

    @num_lookahead_tokens.setter
    def num_lookahead_tokens(self, value: int) -> None:
        self._vllm_lookahead_tokens = value
        options = options_of(self.vllm_config)
        self._drafts = options.drafts if options is not None else 0
