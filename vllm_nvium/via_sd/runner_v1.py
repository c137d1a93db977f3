# SPDX-License-Identifier: Apache-2.0
"""Model Runner V1 with VIA-SD's windows: a mixin over vLLM's own runner class. After the drafter
has answered, the session grows the drafts that the next step verifies with vLLM's own sampler; what
the session needs to see of a step is `V1StepView`.
"""

import time
from collections.abc import Sequence, Set
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch

from vllm_nvium.engine.patches.logits_processors import as_without_speculation
from vllm_nvium.engine.seeds import engine_seed
from vllm_nvium.engine.stats import KEY
from vllm_nvium.model_executor.ranks import told_by_first_rank
from vllm_nvium.model_executor.rows import Rows
from vllm_nvium.model_executor.via_sd.drafting import DraftAgain, drafts_again
from vllm_nvium.model_executor.via_sd.slim import SlimPass
from vllm_nvium.model_executor.via_sd.slim_rows import rows_of_windows
from vllm_nvium.model_executor.via_sd.step import Drafts, SlimDraws, Window
from vllm_nvium.via_sd.loading import load_with_slim_verifier
from vllm_nvium.via_sd.options import AUTO, ViaSDOptions, options_of
from vllm_nvium.via_sd.row_metadata import Span, draws_one_at_a_time
from vllm_nvium.via_sd.sampler import draw_slim, sample_spans
from vllm_nvium.via_sd.scheduler import CONVERSATIONS, ROOM
from vllm_nvium.via_sd.session import Session

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as Runner
else:
    Runner = object  # the mixin stands before vLLM's class and calls it through `super()`


def seeds_of_generators(vllm_config: Any) -> torch.Generator:
    """Draws the seeds of requests that name none: in every data-parallel engine others."""
    return torch.Generator().manual_seed((engine_seed(vllm_config) + 1) % 2**64)


class V1StepView:
    """A `StepView` of Model Runner V1. It reads the runner when it is asked, and is made anew for
    every step, before anything is sampled.

    Args:
        runner: vLLM's, with a slim pass.
    """

    def __init__(self, runner: Any) -> None:
        self.runner, self.batch = runner, runner.input_batch
        self.request_ids: list[str] = self.batch.req_ids
        self.unfinished: Sequence[bool] = runner.discard_request_mask.np[: len(self.request_ids)]
        self.max_slim_rows: int = runner.max_num_tokens
        self.max_model_len: int = runner.max_model_len
        self.drafter_max_model_len: int = runner.effective_drafter_max_model_len
        params = [runner.requests[name].sampling_params for name in self.request_ids]
        one_by_one = draws_one_at_a_time(self.batch, params)
        self.one_at_a_time: Sequence[bool] = [
            one or name in runner.conversations
            for name, one in zip(self.request_ids, one_by_one, strict=True)
        ]

    @cached_property
    def _again(self) -> DraftAgain | None:
        return drafts_again(self.runner)

    @property
    def can_draft_again(self) -> bool:
        return self._again is not None

    def newest(self, row: int) -> tuple[int, int, int]:
        length = int(self.batch.num_tokens_no_spec[row])
        generated = length - int(self.batch.num_prompt_tokens[row])
        return length - 1, int(self.batch.token_ids_cpu[row, length - 1]), generated

    def run_slim(
        self, windows: Sequence[Window], drafts: Drafts
    ) -> tuple[torch.Tensor, list[Rows], torch.Tensor]:
        runner, batch = self.runner, self.batch
        drafted = [len(tokens) for tokens in drafts.tokens]
        tables = [batch.block_table[group] for group in range(len(runner.attn_groups))]
        groups = rows_of_windows(windows, drafted, tables, batch.num_reqs, runner.device)
        token_ids = [
            token
            for window, tokens in zip(windows, drafts.tokens, strict=True)
            for token in (window.last_token, *tokens)
        ]
        hidden = runner.slim(torch.tensor(token_ids, device=runner.device), groups)
        return hidden, groups, runner.slim.compute_logits(hidden)

    def draw_slim(
        self, windows: Sequence[Window], drafts: Drafts, logits: torch.Tensor
    ) -> SlimDraws:
        runner = self.runner
        draws = draw_slim(runner.sampler, logits, self.batch, runner.requests, windows, drafts)
        # Every rank has the same logits, but nothing says that unlike processors draw alike. All of
        # them draw, so that generators stay in step.
        return told_by_first_rank(draws)

    def draft_again(
        self,
        windows: list[Window],
        going: list[int],
        hidden: torch.Tensor,
        rows: list[Rows],
        count: int,
    ) -> Drafts:
        assert self._again is not None
        return told_by_first_rank(self._again(windows, going, hidden, rows, count))


class ViaSDModelRunnerMixin(Runner):
    """Put before `GPUModelRunner` or `CPUModelRunner` in a class's bases."""

    session: Session
    slim: SlimPass | None = None
    # Of the present step.
    _view: V1StepView
    conversations: Set[str] = frozenset()
    # vLLM's own: what the drafter answered, which the next step verifies.
    _draft_token_ids: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with as_without_speculation():
            super().__init__(*args, **kwargs)
        options = options_of(self.vllm_config)
        assert options is not None
        self.session = Session(options, can_draft_again=drafts_again(self) is not None)
        # Seeds of the generators of requests that name none.
        self.seeds = seeds_of_generators(self.vllm_config)
        # Whether vLLM has asked the drafter in this step.
        self._has_drafted = False

    @property
    def via_sd(self) -> ViaSDOptions:
        return self.session.options

    # --- start ----------------------------------------------------------------------------------

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        load = partial(super().load_model, *args, **kwargs)
        slim = load_with_slim_verifier(self, self.via_sd, load)
        if slim is None:
            self.session.leave_tier_off()
        else:
            self.slim = slim

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        super().initialize_kv_cache(*args, **kwargs)
        if self.slim is not None:
            self.slim.attention_groups = self.attn_groups
        if (holder := self.input_batch.thinking_budget_state_holder) is not None:
            # Requests with a budget have no drafts, and one row in every step.
            holder.in_spec_mode = False

    def _dummy_run(self, num_tokens: int, *args: Any, **kwargs: Any) -> Any:
        """vLLM's run without requests, which compiles the model and tells its memory: the slim
        verifier's layers belong to it."""
        output = super()._dummy_run(num_tokens, *args, **kwargs)
        if kwargs.get("is_profile") and self.slim is not None:
            self.slim.warm_up(num_tokens, self.device)
        return output

    def _dummy_sampler_run(self, hidden_states: torch.Tensor) -> Any:
        """vLLM's run of the sampler without requests, which tells its memory: over as many rows as
        a step may have. The rejection sampler, which vLLM would run too, is never asked here."""
        if self.device.type == "cpu":
            # There vLLM asks what a process has, not what it needs at most.
            return super()._dummy_sampler_run(hidden_states)
        rows = hidden_states[:1].expand(self._most_sampled_rows, -1)
        with patch.object(self, "speculative_config", None):
            return super()._dummy_sampler_run(rows)

    @property
    def _most_sampled_rows(self) -> int:
        """Rows of logits in one step: behind each request's newest token and all of its drafts. Of
        the slim verifier there are no more."""
        has_windows = self.slim is not None and self.via_sd.rounds != 0
        drafted = self.via_sd.most_drafts(self.max_num_reqs, has_windows)
        return min(self.max_num_reqs + drafted, self.max_num_tokens)

    # --- one step -------------------------------------------------------------------------------

    def _update_states(self, scheduler_output: "SchedulerOutput") -> Any:
        for request_id in scheduler_output.finished_req_ids:
            self.session.remove(request_id)
        resumed = scheduler_output.scheduled_cached_reqs.resumed_req_ids
        for request_id in {*(scheduler_output.preempted_req_ids or ()), *resumed}:
            self.session.requests.preempted(request_id)
        for new in scheduler_output.scheduled_new_reqs:
            if new.sampling_params is not None:
                self.session.add(new.req_id, new.sampling_params)
        answer = super()._update_states(scheduler_output)
        for new in scheduler_output.scheduled_new_reqs:
            self._give_generator(new.req_id)
        return answer

    def _give_generator(self, request_id: str) -> None:
        """A sampled request without a seed gets a generator too, in vLLM's own place for one, so
        that the slim verifier knows what the full model will draw with."""
        request, state = self.session.requests.get(request_id), self.requests[request_id]
        if self.slim is None or self.via_sd.rounds == 0 or state.generator is not None:
            return
        if request is None or request.is_greedy or not request.is_tiered:
            return
        state.generator = torch.Generator(device=self.device)
        seed = torch.randint(2**63 - 1, (), generator=self.seeds)
        state.generator.manual_seed(int(seed))
        batch = self.input_batch
        batch.generators[batch.req_id_to_index[request_id]] = state.generator

    def execute_model(self, scheduler_output: "SchedulerOutput", *args: Any, **kwargs: Any) -> Any:
        self.conversations = getattr(scheduler_output, CONVERSATIONS, frozenset())
        known = scheduler_output.scheduled_cached_reqs
        self.session.begin_step(
            scheduler_output.num_scheduled_tokens,
            scheduler_output.scheduled_spec_decode_tokens,
            {
                name
                for name, tokens in zip(known.req_ids, known.num_output_tokens, strict=True)
                if tokens > 0
            },
            getattr(scheduler_output, ROOM, None),
        )
        return super().execute_model(scheduler_output, *args, **kwargs)

    def _input_fits_in_drafter(self, common_attn_metadata: Any) -> bool:
        """vLLM leaves room for a whole window behind the longest text; drafters need less."""
        if common_attn_metadata is None:
            return False
        longest = common_attn_metadata.max_seq_len + self.via_sd.drafts
        return bool(longest <= self.effective_drafter_max_model_len)

    def _sample(self, logits: Any, spec_decode_metadata: Any) -> Any:
        if spec_decode_metadata is None or not any(spec_decode_metadata.num_draft_tokens):
            return super()._sample(logits, None)
        batch, counts = self.input_batch, spec_decode_metadata.num_draft_tokens
        spans = [
            Span(row, batch.spec_token_ids[row], generator=batch.generators.get(row))
            for row in range(batch.num_reqs)
        ]
        assert [len(span.drafts) for span in spans] == list(counts)
        kept = self.session.kept(batch.req_ids, counts)
        return sample_spans(self.sampler, logits, batch, self.requests, spans, kept)

    def propose_draft_token_ids(
        self, scheduler_output: "SchedulerOutput", sampled_token_ids: Any, *args: Any, **kwargs: Any
    ) -> Any:
        request_ids, drafts = self.session.plan_drafts(self._view)
        self._has_drafted = True
        start = self._clock()
        # Other drafters must see every token, to learn from it or for their own KV cache.
        method = self.speculative_config.method
        if drafts == 0 and method == "ngram":
            return [[] for _ in sampled_token_ids]
        limited = replace(scheduler_output, num_spec_tokens_to_schedule=drafts)
        # Suffix decoding takes no other count than its own, the window.
        schedule = scheduler_output if method == "suffix" else limited
        answer = super().propose_draft_token_ids(schedule, sampled_token_ids, *args, **kwargs)
        if method == "suffix":
            answer = [tokens[:drafts] for tokens in answer]
        self.session.observe_drafter(len(request_ids), drafts, self._clock() - start)
        return answer

    def _clock(self) -> float:
        """Seconds. vLLM waits for the device only after the drafter's call, and what that takes
        there would count as the full model's."""
        if self.device.type != "cpu" and self.via_sd.rounds == AUTO:
            torch.accelerator.synchronize()
        return time.perf_counter()

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        session = self.session
        self._has_drafted, session.draft_seconds = False, 0.0
        is_step = self.execute_model_state is not None
        if is_step:
            self._view = V1StepView(self)
        # Some drafters answer inside the call, before this step's outcome can be told.
        asked, session.asked = session.asked, {}
        output = super().sample_tokens(*args, **kwargs)
        if is_step:
            session.observe_step(self.input_batch.req_ids, output.sampled_token_ids, asked)
            self._leave_out_drafts()
            if self._has_drafted and session.plan.rounds > 0:
                self._grow_windows()
            # The scheduler reads it; what a process sends to another keeps added attributes.
            setattr(output, KEY, session.report())
            session.end_step()
        return output

    def _leave_out_drafts(self) -> None:
        """Takes back drafts that must not be verified: of requests whose sampling cannot look
        ahead, and the zeros, a whole window of them, that vLLM puts where the drafter did not fit
        into the context."""
        left_out = [not self._has_drafted or one for one in self._view.one_at_a_time]
        found: Any = self._draft_token_ids  # type: ignore[has-type]
        if not any(left_out) or found is None:
            return
        drafts = self._plain_drafts()
        self._draft_token_ids = [
            [] if left else tokens for left, tokens in zip(left_out, drafts, strict=True)
        ]
        self._draft_token_req_ids = list(self.input_batch.req_ids)

    def _grow_windows(self) -> None:
        """Rounds of slim checks on this step's drafts; what comes of them becomes the drafts, as if
        vLLM's drafter had answered with it."""
        ids = self.input_batch.req_ids
        drafts = told_by_first_rank(self._plain_drafts())
        windows = self.session.grow(self._view, drafts)
        if not windows:
            return
        checked = [window for window in windows if window.rounds > 0]
        for window in checked:
            drafts[window.request] = window.tokens
        self.session.hand_over(ids, checked)
        self._draft_token_ids = drafts
        self._draft_token_req_ids = list(ids)

    def _plain_drafts(self) -> list[list[int]]:
        """What the drafter answered, in batch order."""
        found = self._draft_token_ids
        drafts = found if isinstance(found, list) else found.tolist()
        return [list(tokens) for tokens in drafts]
