# SPDX-License-Identifier: Apache-2.0
"""What VIA-SD remembers of every request between steps: what it asked for, and those of its drafts
that the next step verifies."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vllm_nvium.engine.requests import GREEDY_BELOW, RequestTable
from vllm_nvium.model_executor.via_sd.step import Window
from vllm_nvium.via_sd.options import ViaSDOptions, ViaSDRequestOptions
from vllm_nvium.via_sd.planner import OFF

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams


@dataclass(slots=True)
class Request:
    """One request.

    Attributes:
        options: as the request asked.
        params: vLLM's sampling parameters.
        window: its drafts that the slim tier has checked and the next step verifies.
        probs: [W, V] float32, what its drafts were drawn from; None for point masses.
    """

    options: ViaSDRequestOptions
    params: "SamplingParams"
    window: Window | None = None
    probs: torch.Tensor | None = None

    @property
    def is_greedy(self) -> bool:
        return self.params.temperature < GREEDY_BELOW

    @property
    def is_seeded(self) -> bool:
        return not self.is_greedy and self.params.seed is not None

    @property
    def is_tiered(self) -> bool:
        """Whether the slim tier may be used for it."""
        return self.options.on and not self.is_seeded

    @property
    def rule(self) -> str:
        """As the planner calls it."""
        return self.options.mode if self.is_tiered else OFF

    @property
    def keeps_laws(self) -> bool:
        # A grammar cuts drafts that it forbids before they are verified; with point masses that
        # leaves the law alone, with the slim law as proposal it would not.
        return not self.is_greedy and self.params.structured_outputs is None

    @property
    def stop_tokens(self) -> frozenset[int]:
        return frozenset(() if self.params.ignore_eos else self.params.all_stop_token_ids)


class ViaSDRequests(RequestTable[Request]):
    """All requests of a model runner."""

    def add(self, request_id: str, params: "SamplingParams", engine: ViaSDOptions) -> Request:
        """A new request, or one with an id used before; it may override options of the engine."""
        options = ViaSDRequestOptions.from_extra_args(params.extra_args, engine)
        request = self.requests[request_id] = Request(options, params)
        return request

    def preempted(self, request_id: str) -> None:
        self.forget_drafts([request_id])

    def forget_drafts(self, request_ids: Sequence[str]) -> None:
        """Their drafts were verified, or will not be."""
        for request_id in request_ids:
            if (request := self.requests.get(request_id)) is not None:
                request.window = request.probs = None

    def window(self, request_id: str) -> Window | None:
        request = self.requests.get(request_id)
        return None if request is None else request.window

    def probs(self, request_id: str) -> torch.Tensor | None:
        request = self.requests.get(request_id)
        return None if request is None else request.probs

    @property
    def num_with_probs(self) -> int:
        return sum(request.probs is not None for request in self.requests.values())
