# SPDX-License-Identifier: Apache-2.0
"""What VIA-SD remembers of every request between steps: what it asked for, and those of its drafts
that the next step verifies."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_nvium.engine.requests import GREEDY_BELOW, RequestTable
from vllm_nvium.model_executor.via_sd.step import Window
from vllm_nvium.via_sd.options import ViaSDOptions, ViaSDRequestOptions
from vllm_nvium.via_sd.planner.model import OFF

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams


@dataclass(slots=True)
class Request:
    """One request.

    Attributes:
        options: as the request asked.
        params: vLLM's sampling parameters.
        stop_tokens: that end it; made once, because a client may name all of the vocabulary.
        window: its drafts that the slim tier has checked and the next step verifies.
    """

    options: ViaSDRequestOptions
    params: "SamplingParams"
    stop_tokens: frozenset[int] = frozenset()
    window: Window | None = None

    @property
    def is_greedy(self) -> bool:
        return self.params.temperature < GREEDY_BELOW

    @property
    def is_tiered(self) -> bool:
        """Whether the slim tier may be used for it."""
        return self.options.on

    @property
    def rule(self) -> str:
        """As the planner calls it."""
        return self.options.mode if self.is_tiered else OFF


class ViaSDRequests(RequestTable[Request]):
    """All requests of a model runner."""

    def add(self, request_id: str, params: "SamplingParams", engine: ViaSDOptions) -> Request:
        """A new request, or one with an id used before; it may override options of the engine."""
        options = ViaSDRequestOptions.from_extra_args(params.extra_args, engine)
        stop_tokens = frozenset(() if params.ignore_eos else params.all_stop_token_ids)
        request = self.requests[request_id] = Request(options, params, stop_tokens)
        self.ask(request_id, options.request_metrics)
        return request

    def preempted(self, request_id: str) -> None:
        self.forget_drafts([request_id])

    def forget_drafts(self, request_ids: Sequence[str]) -> None:
        """Their drafts were verified, or will not be."""
        for request_id in request_ids:
            if (request := self.requests.get(request_id)) is not None:
                request.window = None

    def window(self, request_id: str) -> Window | None:
        request = self.requests.get(request_id)
        return None if request is None else request.window
