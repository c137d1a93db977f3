# SPDX-License-Identifier: Apache-2.0
"""What both methods know of a request, and the table that they keep it in between steps."""

from typing import Generic, TypeVar

# vLLM's own bound below which a temperature means greedy.
GREEDY_BELOW = 1e-5

R = TypeVar("R")


class RequestTable(Generic[R]):
    """All requests of a model runner, by vLLM's id. A runner tells it when one comes, goes, or is
    preempted; each method says what it remembers of one and what a preemption takes away.

    Attributes:
        requests: id -> what is remembered.
    """

    def __init__(self) -> None:
        self.requests: dict[str, R] = {}

    def get(self, request_id: str) -> R | None:
        return self.requests.get(request_id)

    def remove(self, request_id: str) -> None:
        """A request has finished; harmless for one that is not there."""
        self.requests.pop(request_id, None)

    def preempted(self, request_id: str) -> None:
        """A request has lost its blocks."""
        raise NotImplementedError
