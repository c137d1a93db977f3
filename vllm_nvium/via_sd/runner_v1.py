# SPDX-License-Identifier: Apache-2.0
"""Model Runner V1 with VIA-SD's window: a mixin over vLLM's own runner class. After the drafter has
answered, rounds of slim checks and further drafts grow the drafts that vLLM's own rejection sampler
verifies in the next step.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from vllm_nvium.engine.stats import KEY, Reporter
from vllm_nvium.model_executor.ops.tiers import ESCALATE
from vllm_nvium.model_executor.rows import Rows
from vllm_nvium.model_executor.via_sd.drafting import DraftAgain, drafts_again
from vllm_nvium.model_executor.via_sd.mask import skipped_layers
from vllm_nvium.model_executor.via_sd.slim import SlimPass, SlimVerifier
from vllm_nvium.model_executor.via_sd.slim_rows import rows_of_windows, slim_laws
from vllm_nvium.model_executor.via_sd.step import Drafts, Window, check_round, extend
from vllm_nvium.via_sd.options import AUTO, ViaSDOptions, options_of
from vllm_nvium.via_sd.planner import DraftPlan, FixedRounds, Planner
from vllm_nvium.via_sd.requests import ViaSDRequests
from vllm_nvium.via_sd.sampler import TieredRejectionSampler
from vllm_nvium.via_sd.stats import ViaSDCounts

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as Runner
else:
    Runner = object  # the mixin stands before vLLM's class and calls it through `super()`


# Bytes of laws that the windows of a batch may take if all of them get full. In larger batches
# drafts are taken for point masses, as those of requests with a grammar are. This is decided before
# anything is drawn: what is drawn decides how long a window gets, so that drafts which keep their
# law because windows stayed short would not be draws from it any more.
LARGEST_LAWS = 1 << 30


class ViaSDModelRunnerMixin(Runner):
    """Put before `GPUModelRunner` or `CPUModelRunner` in a class's bases."""

    via_sd: ViaSDOptions
    slim: SlimPass
    # vLLM's own: what the drafter answered, and what the next step verifies.
    _draft_token_ids: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        options = options_of(self.vllm_config)
        assert options is not None
        self.via_sd = options
        spec = self.speculative_config
        self.rejection_sampler = TieredRejectionSampler(self.sampler, spec, self.device)
        self.planner: Planner | FixedRounds
        if options.rounds == AUTO:
            # A drafter that cannot go on inside a window leaves it with one round.
            rounds: dict[str, Any] = {} if drafts_again(self) else {"max_rounds": 1}
            self.planner = Planner(
                options.drafts, options.window, max_batch=options.max_batch, **rounds
            )
        else:
            self.planner = FixedRounds(options.drafts, int(options.rounds), options.max_batch)
        self.via_sd_requests = ViaSDRequests(options)
        self._reporter = Reporter(ViaSDCounts.zero(options.window))
        self._plan = DraftPlan(options.drafts, 0)
        self._draft_seconds = self._step_start = 0.0
        self._has_drafted = False
        # When the last step ended; drafts that were asked for it and go straight to the full model.
        self._step_end: float | None = None
        self._asked: dict[str, int] = {}
        self._generator = torch.Generator(device=self.device)
        # With vLLM's own seed the slim tier would draw the numbers that the full model's sampler
        # does.
        self._generator.manual_seed(self.vllm_config.model_config.seed + 1)

    @property
    def counts(self) -> ViaSDCounts:
        """Since the engine was started."""
        return self._reporter.counts

    # --- start ----------------------------------------------------------------------------------

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        layers = self.model_config.hf_text_config.num_hidden_layers
        # The start has made a list of layers of what the user gave.
        skipped = skipped_layers(self.via_sd.mask, layers)
        self.slim = SlimVerifier(self.get_model(), skipped, self.vllm_config)

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        super().initialize_kv_cache(*args, **kwargs)
        self.slim.attention_groups = self.attn_groups

    def _dummy_run(self, num_tokens: int, *args: Any, **kwargs: Any) -> Any:
        """vLLM's run without requests, which compiles the model and tells its memory: the slim
        verifier's layers and the laws that wait for the full pass belong to it."""
        held = None
        has_tier = self.via_sd.rounds != 0 and self.device.type != "cpu"  # whose KV space is given
        if kwargs.get("is_profile") and has_tier:
            # The windows' laws, and those of all of a step's drafts in one piece.
            laws = min(self._bytes_of_laws(self.max_num_reqs), LARGEST_LAWS)
            held = torch.empty(2 * laws, dtype=torch.uint8, device=self.device)
        output = super()._dummy_run(num_tokens, *args, **kwargs)
        if kwargs.get("is_profile"):
            self.slim.warm_up(num_tokens, self.device)
        del held
        return output

    # --- one step -------------------------------------------------------------------------------

    def _update_states(self, scheduler_output: "SchedulerOutput") -> Any:
        for request_id in scheduler_output.finished_req_ids:
            self.via_sd_requests.remove(request_id)
            self.planner.remove(request_id)
        resumed = scheduler_output.scheduled_cached_reqs.resumed_req_ids
        for request_id in {*(scheduler_output.preempted_req_ids or ()), *resumed}:
            self.via_sd_requests.preempted(request_id)
        for new in scheduler_output.scheduled_new_reqs:
            if new.sampling_params is not None:
                request = self.via_sd_requests.add(new.req_id, new.sampling_params)
                # A session that goes on may have changed its rule.
                self.planner.remove(new.req_id)
                self.planner.add(new.req_id, request.rule, request.is_greedy)
        return super()._update_states(scheduler_output)

    def execute_model(self, scheduler_output: "SchedulerOutput", *args: Any, **kwargs: Any) -> Any:
        self._step_start = time.perf_counter()
        drafts = scheduler_output.scheduled_spec_decode_tokens
        scheduled = scheduler_output.num_scheduled_tokens
        # The last token of a prompt is one row too.
        known = scheduler_output.scheduled_cached_reqs
        decoding = {
            name
            for name, tokens in zip(known.req_ids, known.num_output_tokens, strict=True)
            if tokens > 0
        }
        self._is_decode = bool(scheduled) and all(
            name in decoding and rows == 1 + len(drafts.get(name, ()))
            for name, rows in scheduled.items()
        )
        self._verified = drafts
        if self._is_decode and self._step_end is not None:
            self.planner.observe_overhead(len(scheduled), self._step_start - self._step_end)
        self._step_end = None
        return super().execute_model(scheduler_output, *args, **kwargs)

    def _input_fits_in_drafter(self, common_attn_metadata: Any) -> bool:
        """vLLM leaves room for a whole window behind the longest text; drafters need less."""
        if common_attn_metadata is None:
            return False
        longest = common_attn_metadata.max_seq_len + self.via_sd.drafts
        return bool(longest <= self.effective_drafter_max_model_len)

    def _sample(self, logits: Any, spec_decode_metadata: Any) -> Any:
        if spec_decode_metadata is not None and not any(spec_decode_metadata.num_draft_tokens):
            # All drafts were cut: vLLM's rejection sampler fails at top-k of no rows.
            spec_decode_metadata = None
        if spec_decode_metadata is not None:
            self.rejection_sampler.kept = self._kept(spec_decode_metadata.num_draft_tokens)
        try:
            return super()._sample(logits, spec_decode_metadata)
        finally:
            self.rejection_sampler.kept = None

    def _get_spec_decode_draft_probs(self, spec_decode_metadata: Any) -> torch.Tensor | None:
        """[drafts, V] float32, what the drafts of this step were drawn from.

        vLLM's own knows those of the last step only. With those of a request that had to wait for
        its turn it would forget all others too, and take draws for point masses.
        """
        counts = spec_decode_metadata.num_draft_tokens
        found = [
            self.via_sd_requests.probs(name) for name in self.input_batch.req_ids[: len(counts)]
        ]
        if not any(count and own is not None for count, own in zip(counts, found, strict=True)):
            return None
        laws = torch.zeros(sum(counts), self.input_batch.vocab_size, device=self.device)
        # vLLM's placeholders, -1, are never accepted and take nothing from the law.
        tokens = spec_decode_metadata.draft_token_ids.long()
        laws.scatter_(1, tokens.clamp(min=0)[:, None], (tokens >= 0).float()[:, None])
        start = 0
        for count, own in zip(counts, found, strict=True):
            if own is not None:
                laws[start : start + count] = own[:count]
            start += count
        return laws

    def _kept(self, num_draft_tokens: list[int]) -> torch.Tensor | None:
        """Which of this step's drafts the paper's rule keeps without asking the full model."""
        kept: list[bool] = []
        for request_id, count in zip(self.input_batch.req_ids, num_draft_tokens, strict=False):
            window = self.via_sd_requests.window(request_id)
            own = window is not None and window.is_paper
            # vLLM may have cut a window short, or replaced it when the request was preempted.
            drafts = self._verified.get(request_id, ())
            if own and list(drafts) == window.tokens[:count]:  # type: ignore[union-attr]
                kept += [tier != ESCALATE for tier in window.tiers[:count]]  # type: ignore[union-attr]
            else:
                kept += [False] * count
        return torch.tensor(kept, device=self.device) if any(kept) else None

    def propose_draft_token_ids(
        self, scheduler_output: "SchedulerOutput", sampled_token_ids: Any, *args: Any, **kwargs: Any
    ) -> Any:
        start = time.perf_counter()
        request_ids = self._drafting()
        if request_ids:
            self._plan = self.planner.plan(request_ids, self._count_of_decoding())
        # Where all are seeded or read their prompts, nobody is to have drafts.
        drafts = self._plan.num_draft_tokens if request_ids else 0
        limited = replace(scheduler_output, num_spec_tokens_to_schedule=drafts)
        self._has_drafted = True
        self._asked = dict.fromkeys(request_ids, drafts)
        # Other drafters must see every token, to learn from it or for their own KV cache.
        method = self.speculative_config.method
        if drafts == 0 and method == "ngram":
            return [[] for _ in sampled_token_ids]
        # Suffix decoding takes no other count than its own, the window.
        schedule = scheduler_output if method == "suffix" else limited
        answer = super().propose_draft_token_ids(schedule, sampled_token_ids, *args, **kwargs)
        if method == "suffix":
            answer = [tokens[:drafts] for tokens in answer]
        self._draft_seconds = time.perf_counter() - start
        # A draft model reads prompts, too, which has nothing to do with drafts.
        if self._is_decode and request_ids:
            self.planner.observe_draft_call(len(request_ids), drafts, self._draft_seconds)
        return answer

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        self._has_drafted, self._draft_seconds = False, 0.0
        is_step = self.execute_model_state is not None
        # Some drafters answer inside the call, before this step's outcome can be told.
        asked, self._asked = self._asked, {}
        output = super().sample_tokens(*args, **kwargs)
        if is_step:
            self._observe_step(output, asked)
            # Requests that had no turn in this step still wait with their drafts.
            self.via_sd_requests.forget_drafts(self.input_batch.req_ids)
            self._leave_out_drafts()
            if self._has_drafted and self._plan.rounds > 0:
                self._grow_windows()
            self._keep_laws_of_plain_drafts()
            # The scheduler reads it; what a process sends to another keeps added attributes.
            plan = self._plan
            report = self._reporter.report(drafts=plan.num_draft_tokens, rounds=plan.rounds)
            setattr(output, KEY, report)
            self._step_end = time.perf_counter()
        return output

    def _observe_step(self, output: Any, asked: dict[str, int]) -> None:
        """What the pass of the full model taught.

        Args:
            asked: drafts that each request was to get, of those that the slim tier did not check.
        """
        ids = self.input_batch.req_ids
        if self._is_decode:
            seconds = time.perf_counter() - self._step_start - self._draft_seconds
            rows = len(ids) + sum(map(len, self._verified.values()))
            self.planner.observe_full_pass(rows, seconds)
            self.counts.full_passes += 1
        for request_id, tokens in zip(ids, output.sampled_token_ids, strict=True):
            drafts = self._verified.get(request_id, ())
            request = self.via_sd_requests.get(request_id)
            if not tokens or request is None:
                continue
            if self._is_decode:
                self.counts.turns += 1
                self.counts.tokens += len(tokens)
            if not drafts and request_id not in asked:
                continue
            window = request.window
            accepted = len(tokens) - 1
            if window is not None:
                tiers = window.tiers[: len(drafts)]
                self.counts.observe_window(len(drafts), accepted)
                if window.is_paper:
                    for tier in tiers:
                        self.counts.tiers[tier] += 1
            self.planner.observe_full_check(
                request_id, len(drafts), accepted, window is not None, asked.get(request_id, 0)
            )

    def _drafting(self) -> list[str]:
        """Requests that decode in the next step and may have drafts in it."""
        ids = self.input_batch.req_ids
        discarded = self.discard_request_mask.np[: len(ids)]
        requests = [self.via_sd_requests.get(request_id) for request_id in ids]
        return [
            ids[i]
            for i, request in enumerate(requests)
            if not discarded[i] and request is not None and not request.is_seeded
        ]

    def _count_of_decoding(self) -> int:
        """Requests that decode in the next step, with or without drafts."""
        count = self.input_batch.num_reqs
        return count - int(self.discard_request_mask.np[:count].sum())

    def _leave_out_drafts(self) -> None:
        """Takes back drafts that must not be verified.

        How many there are follows the clock, and so would what a seed draws: seeded requests are
        decoded plainly. And where the drafter did not fit into the context vLLM puts zeros, a whole
        window of them.
        """
        requests = [self.via_sd_requests.get(name) for name in self.input_batch.req_ids]
        left_out = [
            not self._has_drafted or (request is not None and request.is_seeded)
            for request in requests
        ]
        found: Any = self._draft_token_ids  # type: ignore[has-type]
        if not any(left_out) or found is None:
            return
        drafts, _ = self._plain_drafts()
        self._draft_token_ids = [
            [] if left else tokens for left, tokens in zip(left_out, drafts, strict=True)
        ]
        self._draft_token_req_ids = list(self.input_batch.req_ids)

    def _keep_laws_of_plain_drafts(self) -> None:
        """Drafts that the slim tier did not check are proposals too, with the drafter's law."""
        if self._draft_probs is None or self._draft_prob_req_ids is None:
            return
        for request_id, laws in zip(self._draft_prob_req_ids, self._draft_probs, strict=False):
            request = self.via_sd_requests.get(request_id)
            if request is not None and request.keeps_laws:
                request.probs = laws

    # --- the window -----------------------------------------------------------------------------

    def _grow_windows(self) -> None:
        """Rounds of slim checks on this step's drafts, and what becomes of them."""
        windows = self._open_windows()
        all_drafts, all_probs = self._plain_drafts()
        if not windows:
            return
        again = drafts_again(self)
        drafts = Drafts(
            [all_drafts[window.request] for window in windows],
            None if all_probs is None else all_probs[[window.request for window in windows]],
        )
        current = windows
        done = 0
        ids = self.input_batch.req_ids
        for window in windows:
            self._asked.pop(ids[window.request], None)
        while drafts := drafts.trimmed(self._rooms(current)):
            hidden, rows = self._check(current, drafts)
            done += 1
            # Positions in `current` of those that go on.
            going = [i for i, window in enumerate(current) if window.is_open]
            if not going or again is None:
                break
            lengths = [len(current[i].tokens) for i in going]
            names = [ids[current[i].request] for i in going]
            if not self.planner.another_round(lengths, done, names):
                break
            drafts = self._draft_again(again, current, going, hidden, rows)
            current = [current[i] for i in going]
        else:
            for window in current:
                self._observe_slim_check(window, window.room, 0, 0, window.rounds == 0)
        self._hand_over(windows, all_drafts)

    def _rooms(self, windows: Sequence[Window]) -> list[int]:
        """Tokens that each window may grow by, so that all of them fit into one pass of the slim
        verifier, and then of a draft model, which adds a row of its own for each."""
        most = self.max_num_tokens // max(len(windows), 1) - 1
        return [min(window.room, most) for window in windows]

    def _bytes_of_laws(self, windows: int) -> int:
        """Of full windows: float32 over the vocabulary for each token."""
        return 4 * windows * self.via_sd.window * self.input_batch.vocab_size

    def _open_windows(self) -> list[Window]:
        """One for each request that may use the tier in this step."""
        windows = []
        batch = self.input_batch
        # Requests that have no turn keep theirs.
        with_laws = batch.num_reqs + self.via_sd_requests.num_with_probs
        may_keep_laws = self._bytes_of_laws(with_laws) <= LARGEST_LAWS
        for i, request_id in enumerate(batch.req_ids):
            request = self.via_sd_requests.get(request_id)
            if request is None or not request.is_tiered or self.discard_request_mask.np[i]:
                continue
            length = int(batch.num_tokens_no_spec[i])
            generated = length - int(batch.num_prompt_tokens[i])
            left = (request.params.max_tokens or self.max_model_len) - generated
            # The full model adds one token of its own behind the window.
            limit = min(self.via_sd.window, left - 1, self.max_model_len - length)
            if limit < 1:
                continue
            newest = int(batch.token_ids_cpu[i, length - 1])
            if newest in request.stop_tokens:
                continue
            windows.append(
                Window(
                    request=i,
                    position=length - 1,
                    newest=newest,
                    limit=limit,
                    is_greedy=request.is_greedy,
                    is_paper=request.options.mode == "paper",
                    accept=request.options.accept,
                    escalate=request.options.escalate,
                    stop_tokens=request.stop_tokens,
                    keeps_laws=request.keeps_laws and may_keep_laws,
                )
            )
        return windows

    def _plain_drafts(self) -> tuple[list[list[int]], torch.Tensor | None]:
        """What the drafter answered, in batch order."""
        found = self._draft_token_ids
        drafts = found if isinstance(found, list) else found.tolist()
        probs = self._draft_probs
        if probs is not None:
            assert self._draft_prob_req_ids is not None
            row_of = {name: row for row, name in enumerate(self._draft_prob_req_ids)}
            probs = probs[[row_of[name] for name in self.input_batch.req_ids]]
        return [list(tokens) for tokens in drafts], probs

    def _check(self, windows: list[Window], drafts: Drafts) -> tuple[torch.Tensor, list[Rows]]:
        """One slim pass and what it leaves: the windows grow.

        Returns:
            hidden states [T, H] of the pass and its rows per KV cache group.
        """
        start = time.perf_counter()
        batch, drafted = self.input_batch, [len(tokens) for tokens in drafts.tokens]
        tables = [batch.block_table[group] for group in range(len(self.attn_groups))]
        groups = rows_of_windows(windows, drafted, tables, batch.num_reqs, self.device)
        token_ids = [
            token
            for window, tokens in zip(windows, drafts.tokens, strict=True)
            for token in (window.last_token, *tokens)
        ]
        hidden = self.slim(torch.tensor(token_ids, device=self.device), groups)
        logits = self.model.compute_logits(hidden)
        found = check_round(windows, drafts, logits, self._laws, self._generator)
        accepted = found.accepted.tolist()
        rooms = [window.room for window in windows]
        is_first = windows[0].rounds == 0
        extend(windows, drafts, found)
        seconds = time.perf_counter() - start
        self.planner.observe_slim_pass(len(token_ids), seconds)
        self.counts.slim_passes += 1
        for window, room, tokens, kept in zip(windows, rooms, drafts.tokens, accepted, strict=True):
            self.counts.slim_drafted += len(tokens)
            self.counts.slim_accepted += kept - self._escalated(window)
            self._observe_slim_check(window, room, len(tokens), kept, is_first)
        return hidden, groups

    def _observe_slim_check(
        self, window: Window, room: int, drafted: int, accepted: int, is_first: bool
    ) -> None:
        """One round of a window that had room for so many tokens."""
        escalated = self._escalated(window)
        asked = max(min(self._plan.num_draft_tokens, room - 1), 0)
        name = self.input_batch.req_ids[window.request]
        self.planner.observe_slim_check(name, asked, drafted, accepted, escalated, is_first)

    @staticmethod
    def _escalated(window: Window) -> int:
        """Tokens that the paper's rule leaves to the full model; a window ends with the first
        round that has such a token."""
        return window.tiers.count(ESCALATE) if window.is_paper else 0

    def _laws(
        self, logits: torch.Tensor, windows: Sequence[Window], counts: torch.Tensor
    ) -> torch.Tensor:
        """`slim_laws` under what the windows' requests ask of the sampler."""
        requests = torch.tensor([window.request for window in windows], device=logits.device)
        sampling = self.input_batch.sampling_metadata
        temperature, top_k, top_p = (
            None if found is None else found[requests]
            for found in (sampling.temperature, sampling.top_k, sampling.top_p)
        )
        return slim_laws(logits, windows, counts, temperature, top_k, top_p)

    def _draft_again(
        self,
        again: DraftAgain,
        windows: list[Window],
        going: list[int],
        hidden: torch.Tensor,
        rows: list[Rows],
    ) -> Drafts:
        """The drafter goes on from where the windows that are still open end."""
        start = time.perf_counter()
        room = max(windows[i].room for i in going) - 1
        # A draft model may read fewer positions than the target.
        longest = max(windows[i].last_position for i in going)
        count = min(
            self._plan.num_draft_tokens, room, self.effective_drafter_max_model_len - 1 - longest
        )
        if count < 1:
            return Drafts([[] for _ in going])
        drafts = again(windows, going, hidden, rows, count)
        seconds = time.perf_counter() - start
        self.planner.observe_draft_call(len(going), count, seconds)
        return drafts

    def _hand_over(self, windows: list[Window], all_drafts: list[list[int]]) -> None:
        """Makes the windows this step's drafts, as if vLLM's drafter had answered with them."""
        ids = self.input_batch.req_ids
        self._keep_laws_of_plain_drafts()
        for window in windows:
            if window.rounds == 0:
                continue
            request = self.via_sd_requests.requests[ids[window.request]]
            request.window, request.probs = window, None
            all_drafts[window.request] = window.tokens
            if window.keeps_laws and window.tokens:
                request.probs = torch.stack(window.laws)
                window.laws.clear()
        self._draft_token_ids = all_drafts
        self._draft_token_req_ids = list(ids)
        # They wait with their requests, no longer than the drafts do.
        self._draft_probs, self._draft_prob_req_ids = None, None
