# SPDX-License-Identifier: Apache-2.0
"""Plans of tensor-parallel ranks: all go by the planner of the first, whose clock is one of many. A
plan decides which passes run next, and ranks that run others wait for each other without end.
"""

from collections.abc import Sequence
from typing import Any

from vllm_nvium.model_executor.ranks import is_first_rank, number_of_ranks, told_by_first_rank
from vllm_nvium.via_sd.planner.choose import Planner
from vllm_nvium.via_sd.planner.fixed import FixedRounds
from vllm_nvium.via_sd.planner.model import DraftPlan


class PlansOfFirstRank:
    """In place of a planner where there are several ranks: what rank 0's decides, told to all.

    The price is one broadcast per step and one per round, of a few bytes, beside two all-reduces of
    whole states in every layer of a pass.

    Args:
        own: of this rank; what it decides counts on rank 0 only.
    """

    def __init__(self, own: Planner | FixedRounds) -> None:
        self.own = own

    def plan(
        self, request_ids: Sequence[str], num_decoding: int = 0, most: int | None = None
    ) -> DraftPlan:
        return told_by_first_rank(self.own.plan(request_ids, num_decoding, most))

    def another_round(self, *args: Any, **kwargs: Any) -> bool:
        return told_by_first_rank(self.own.another_round(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        """All else is this rank's own: what it has seen, and numbers for decisions above."""
        return getattr(self.own, name)


def shared(planner: Planner | FixedRounds) -> Planner | FixedRounds | PlansOfFirstRank:
    """The planner as every rank is to ask it: itself where it decides without a clock, or where
    there is one rank."""
    if isinstance(planner, FixedRounds) or number_of_ranks() == 1:
        return planner
    # Nobody listens to the other ranks, so they need not forecast.
    return PlansOfFirstRank(planner if is_first_rank() else FixedRounds(0, 0))
