# SPDX-License-Identifier: Apache-2.0
"""What both methods know of a request, and the table that they keep it in between steps."""

from typing import Generic, TypeVar

from vllm_nvium.engine.request_metrics import Level

# vLLM's own bound below which a temperature means greedy.
GREEDY_BELOW = 1e-5

R = TypeVar("R")


class RequestTable(Generic[R]):
    """All requests of a model runner, by vLLM's id. A runner tells it when one comes, goes, or is
    preempted; each method says what it remembers of one and what a preemption takes away.

    Attributes:
        requests: id -> what is remembered.
        asked: id -> level, of those that want to be told of their tokens.
    """

    def __init__(self) -> None:
        self.requests: dict[str, R] = {}
        self.asked: dict[str, Level] = {}

    def get(self, request_id: str) -> R | None:
        return self.requests.get(request_id)

    def remove(self, request_id: str) -> None:
        """A request has finished; harmless for one that is not there."""
        self.requests.pop(request_id, None)
        self.asked.pop(request_id, None)

    def ask(self, request_id: str, level: Level) -> None:
        """A request wants to be told so much of its tokens, from now on."""
        self.asked.pop(request_id, None)
        if level != "none":
            self.asked[request_id] = level

    def preempted(self, request_id: str) -> None:
        """A request has lost its blocks."""
        raise NotImplementedError
