# SPDX-License-Identifier: Apache-2.0
"""What stands in for the planner under `--via-sd-rounds N`: nothing is measured or learnt."""

from collections.abc import Sequence
from typing import Any

from vllm_nvium.via_sd.planner.model import DraftPlan


class FixedRounds:
    """In place of the planner under `--via-sd-rounds N`: always the same plan, but without the slim
    tier while more than `max_batch` requests decode."""

    def __init__(self, num_draft_tokens: int, rounds: int, max_batch: int | None = None) -> None:
        self.fixed, self.max_batch = DraftPlan(num_draft_tokens, rounds), max_batch

    def plan(
        self, request_ids: Sequence[str], num_decoding: int = 0, most: int | None = None
    ) -> DraftPlan:
        count = max(num_decoding, len(request_ids))
        if self.max_batch is not None and count > self.max_batch:
            return DraftPlan(self.fixed.num_draft_tokens, 0)
        return self.fixed

    def another_round(self, _: Sequence[int], rounds_done: int, *__: Any) -> bool:
        return rounds_done < self.fixed.rounds

    def survival(self, *_: Any) -> float:
        return 1.0

    def _ignore(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is learnt."""

    add = remove = observe_full_pass = observe_slim_pass = observe_draft_call = _ignore
    observe_overhead = observe_slim_check = observe_full_check = _ignore
