# SPDX-License-Identifier: Apache-2.0
"""What VIA-SD's session needs of a model runner: one step as it sees it. Another runner of vLLM
needs an adapter with these methods and no more.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from vllm_nvium.model_executor.rows import Rows
from vllm_nvium.model_executor.via_sd.step import Drafts, SlimDraws, Window


class StepView(Protocol):
    """The present step of a model runner, as the session sees it; rows are requests in batch order.

    Attributes:
        request_ids: [R].
        unfinished: [R], whether more of a request's prompt follows, so that it does not decode.
        one_at_a_time: [R], whether a request is to have no drafts: its next token has to be drawn
            before anything is known of the one behind it, or it is a conversation that goes on.
        max_slim_rows: most rows of one slim pass.
        max_model_len, drafter_max_model_len: most positions that target and drafter read.
        can_draft_again: whether the drafter can go on inside a window.
    """

    request_ids: list[str]
    unfinished: Sequence[bool]
    one_at_a_time: Sequence[bool]
    max_slim_rows: int
    max_model_len: int
    drafter_max_model_len: int

    @property
    def can_draft_again(self) -> bool: ...

    def newest(self, row: int) -> tuple[int, int, int]:
        """A request's newest token: its position, its id, and how many were generated with it."""
        ...

    def run_slim(
        self, windows: Sequence[Window], drafts: Drafts
    ) -> tuple[torch.Tensor, list[Rows], torch.Tensor]:
        """One slim pass over the newest token of each window and its drafts: hidden states [T, H],
        their rows per KV cache group, and logits [T, V]."""
        ...

    def draw_slim(
        self, windows: Sequence[Window], drafts: Drafts, logits: torch.Tensor
    ) -> SlimDraws:
        """What the slim verifier draws, given the logits of its rows."""
        ...

    def draft_again(
        self,
        windows: list[Window],
        going: list[int],
        hidden: torch.Tensor,
        rows: list[Rows],
        count: int,
    ) -> Drafts:
        """The drafter goes on from where the windows end that are `going` on."""
        ...
