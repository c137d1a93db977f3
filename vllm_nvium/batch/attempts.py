# SPDX-License-Identifier: Apache-2.0
"""How often a row was begun and not finished, kept outside the replicas: a row that ends the engine
again and again gets an error, instead of ending it for ever."""

from collections import Counter
from typing import Any

# Unfinished starts after which a row runs alone, and after which it does not run at all. Below,
# it was most likely another row's fault, or nobody's.
ALONE_FROM, MOST = 2, 4


class Counts:
    """Unfinished starts by row; an actor of Ray."""

    def __init__(self) -> None:
        self._begun: Counter[int] = Counter()

    def begin(self, indices: list[int], alone: bool = False) -> list[int]:
        """Note rows that are begun, and say how often each was before.

        Args:
            alone: their turn to run alone has come; before that, such rows are not begun.
        """
        before = [self._begun[index] for index in indices]
        for index, count in zip(indices, before, strict=True):
            if alone or count < ALONE_FROM:
                self._begun[index] += 1
        return before

    def finish(self, indices: list[int]) -> None:
        """Forget rows that have a result."""
        for index in indices:
            self._begun.pop(index, None)


class Attempts:
    """`Counts` from inside a replica.

    Args:
        actor: handle of the actor.
    """

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def begin(self, indices: list[int], alone: bool = False) -> list[int]:
        return await self._actor.begin.remote(indices, alone)

    async def finish(self, indices: list[int]) -> None:
        await self._actor.finish.remote(indices)
