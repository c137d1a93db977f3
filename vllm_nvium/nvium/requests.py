# SPDX-License-Identifier: Apache-2.0
"""What N-vium remembers of every request between steps, and the arrays one step needs of it.

Both model runners keep one `NviumRequests`; it knows nothing of either.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vllm_nvium.engine.requests import GREEDY_BELOW, RequestTable
from vllm_nvium.model_executor.nvium import policy
from vllm_nvium.model_executor.nvium.step import Sampling
from vllm_nvium.nvium.options import NviumOptions
from vllm_nvium.nvium.request_seeds import RequestSeeds

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

UNLIMITED = np.iinfo(np.int64).max


def is_ancestral(params: "SamplingParams") -> bool:
    """Whether drawing an exit and then a token from its head is exactly a draw from the mixture.

    That is so for plain sampling at temperature 1. Whatever changes the distribution, or reports
    it, has to see the mixture itself (arXiv:2605.13190, sampling).
    """
    return (
        params.temperature == 1.0
        and params.top_p == 1.0
        and params.top_k in (0, -1)
        and params.min_p == 0.0
        and not _needs_distribution(params)
    )


def is_plain_greedy(params: "SamplingParams") -> bool:
    """Whether the request only needs the argmax of the mixture."""
    return params.temperature < GREEDY_BELOW and not _needs_distribution(params)


def _needs_distribution(params: "SamplingParams") -> bool:
    """Whether a request changes or reports the distribution that its tokens are drawn from."""
    return bool(
        params.presence_penalty
        or params.frequency_penalty
        or params.repetition_penalty != 1.0
        or params.logit_bias
        or params.allowed_token_ids is not None
        or params.bad_words
        or params.min_tokens
        or params.structured_outputs is not None
        or params.logprobs is not None
        or params.logprob_token_ids
        or params.thinking_token_budget is not None
        or params.trace_decode_token_ids
        or params.watermarking
    )


@dataclass(slots=True)
class RequestInfo:
    """One request.

    Attributes:
        seed: of its exit draws.
        greedy: temperature 0: leave iff the margin exceeds the model's greedy margin, no draw.
        mixture: its newest token needs the mixture, not one head.
        mixture_greedy: of those, only its argmax.
        prompt_logprobs: every prompt row needs the mixture.
        max_deferred: how many positions it may leave behind.
        complete: leading positions known to be through every segment. 0 until the first pass at
            full depth in the blocks it holds now.
        is_told: the scheduler knows that it has left positions open, see `NviumRequests.stopped`.
    """

    seed: int
    greedy: bool
    mixture: bool
    mixture_greedy: bool
    prompt_logprobs: bool
    max_deferred: int
    complete: int = 0
    is_told: bool = False


class NviumRequests(RequestTable[RequestInfo]):
    """All requests of a model runner, and the per-step arrays in the order of its batch.

    Args:
        options: of the engine; a request may override them.
        engine_seed: vLLM's `--seed`.
        num_exits: early exits of the model.
        always_full: custom logits processors are loaded, so no request may be taken for plain.
        decide_early: whether greedy decoding of the mixture may stop before the last head.
        greedy_margin: at temperature 0 a token leaves where `e_k - c_k` exceeds this.
        max_rows: of a pass, vLLM's `max_num_batched_tokens`.

    Attributes:
        told: what the scheduler has to hear of requests, until it is reported: id -> `complete` of
            one that has left positions open, None where that is over.
    """

    def __init__(
        self,
        options: NviumOptions,
        engine_seed: int,
        num_exits: int,
        always_full: bool = False,
        decide_early: bool = True,
        greedy_margin: float = 0.0,
        max_rows: int = UNLIMITED,
    ) -> None:
        super().__init__()
        self.max_rows = max_rows
        self.told: dict[str, int | None] = {}
        self._all_told = False
        self.options = options
        self._seeds_of_requests = RequestSeeds(engine_seed)
        self.num_exits = num_exits
        self.always_full = always_full
        self.decide_early = decide_early
        self.greedy_margin = greedy_margin
        self._order: list[str] = []
        self._rows: list[RequestInfo] = []

    def add(self, request_id: str, params: "SamplingParams | None") -> None:
        """A new request, or one with an id used before."""
        if params is None:
            return
        self.remove(request_id)
        options = self.options.of_request(params.extra_args)
        mixture = options.sampling == "mixture"
        needs_all = mixture and (self.always_full or not is_ancestral(params))
        self.requests[request_id] = RequestInfo(
            seed=self._seeds_of_requests.seed_of(params.seed, request_id),
            greedy=params.temperature < GREEDY_BELOW,
            mixture=needs_all,
            mixture_greedy=needs_all
            and self.decide_early
            and not self.always_full
            and is_plain_greedy(params),
            prompt_logprobs=params.prompt_logprobs is not None
            or params.prompt_logprob_token_ids is not None,
            max_deferred=UNLIMITED if options.max_deferred is None else options.max_deferred,
        )
        self.ask(request_id, options.request_metrics)
        self._order = []

    def remove(self, request_id: str) -> None:
        if (info := self.requests.get(request_id)) is not None and info.is_told:
            self.told[request_id] = None  # on Model Runner V2 it may come back
        super().remove(request_id)
        self._order = []

    def preempted(self, request_id: str) -> None:
        """What it held complete it may no longer hold."""
        if info := self.requests.get(request_id):
            info.complete, info.is_told = 0, False
            # It may come back into the same batch: `reset_prefix_cache` preempts all at once.
            self._order = []

    def _arrange(self, request_ids: Sequence[str]) -> None:
        """Per-request constants in batch order; remade only when the batch changes."""
        self._order, self._all_told = list(request_ids), False
        rows = self._rows = [self.requests[request_id] for request_id in request_ids]
        self._seeds = np.array([row.seed for row in rows], dtype=np.uint64)
        self._greedy = np.array([row.greedy for row in rows], dtype=bool)
        self._any_sampled = not self._greedy.all()
        if not self._any_sampled:
            self._greedy_thresholds = self._thresholds(np.zeros(len(rows), dtype=np.int64))
        self._mixture = np.array([row.mixture for row in rows], dtype=bool)
        self._mixture_greedy = np.array([row.mixture_greedy for row in rows], dtype=bool)
        # What needs the mixture never stops early, unless its argmax can be settled.
        self._may_stop = ~self._mixture | self._mixture_greedy
        self._prompt_logprobs = np.array([row.prompt_logprobs for row in rows], dtype=bool)
        self._any_wide = bool(self._mixture.any() or self._prompt_logprobs.any())
        self._max_deferred = np.array([row.max_deferred for row in rows], dtype=np.int64)
        self.complete = np.array([row.complete for row in rows], dtype=np.int64)

    def _thresholds(self, positions: np.ndarray) -> np.ndarray:
        return policy.thresholds(
            self._seeds, positions, self._greedy, self.greedy_margin, self.num_exits
        )

    def sampling(
        self,
        request_ids: Sequence[str],
        last: np.ndarray,
        decoding: np.ndarray,
        unfinished: np.ndarray,
    ) -> Sampling:
        """How the newest token of every request chooses its head in this step.

        Args:
            request_ids: [R], in batch order.
            last: [R] int64, positions of the newest rows.
            decoding: [R] bool, False while a request has prompt rows in the step.
            unfinished: [R] bool, more of the prompt follows, so nothing is sampled in this step.
        """
        if self._order != request_ids:
            self._arrange(request_ids)
        thresholds = self._thresholds(last) if self._any_sampled else self._greedy_thresholds
        # Stopping now would leave positions complete..last behind. A request that has not yet been
        # through a full pass in its present blocks goes on, prompt row or not. And whoever goes to
        # full depth runs what all have left: never more than what vLLM runs as one step's prompts.
        behind = last + 1 - self.complete
        allowed = (behind <= self._max_deferred) & (self.complete > 0)
        allowed &= behind.sum() <= self.max_rows
        prompt_rows = self._prompt_logprobs & ~decoding
        # The newest row of a prompt that goes on is an ordinary prompt row.
        mixture = self._mixture | (prompt_rows & unfinished) if self._any_wide else self._mixture
        return Sampling(
            thresholds=thresholds,
            may_stop=decoding & allowed & self._may_stop,
            mixture=mixture,
            greedy=self._mixture_greedy,
            all_rows=prompt_rows,
            wide=self._any_wide and bool(mixture.any() or prompt_rows.any()),
        )

    def completed(self, last: np.ndarray) -> None:
        """A step went to full depth: every request of it is complete up to its newest position.

        Args:
            last: [R] int64, in the order of the last `sampling` call.
        """
        self.complete[:] = last + 1
        for request_id, row, complete in zip(
            self._order, self._rows, self.complete.tolist(), strict=True
        ):
            row.complete = complete
            if row.is_told:
                row.is_told = False
                self.told[request_id] = None
        self._all_told = False

    def stopped(self) -> None:
        """A step ended early, so that each of its requests has left its newest position open. The
        scheduler hears of that: such positions are not for others to find, see
        `engine/prefix_cache.py`."""
        if self._all_told:
            return
        for request_id, row in zip(self._order, self._rows, strict=True):
            if not row.is_told:
                row.is_told = True
                self.told[request_id] = row.complete
        self._all_told = True
