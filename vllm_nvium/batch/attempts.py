# SPDX-License-Identifier: Apache-2.0
"""How often a row was begun and not finished, kept outside the replicas: a row that ends the engine
again and again gets an error, instead of ending it for ever."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

# Unfinished starts after which no two such rows run at a time, and after which a row runs no more.
# Below, it was most likely another row's fault, or nobody's.
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


class Turns:
    """Which rows of one replica run at the same time: all of them, but of those that are suspected
    one, and beside that on its last attempt none."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._suspected = asyncio.Lock()
        self._beside = 0
        self._is_closed = False

    @asynccontextmanager
    async def beside(self) -> AsyncIterator[None]:
        """While a row that nobody suspects runs."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._is_closed)
            self._beside += 1
        try:
            yield
        finally:
            async with self._changed:
                self._beside -= 1
                self._changed.notify_all()

    @asynccontextmanager
    async def one_by_one(self, alone: bool) -> AsyncIterator[None]:
        """While a suspected row runs.

        Args:
            alone: wait for all others, and keep new ones waiting.
        """
        async with self._suspected:
            try:
                async with self._changed:
                    self._is_closed = alone
                    await self._changed.wait_for(lambda: not (alone and self._beside))
                yield
            finally:
                async with self._changed:
                    self._is_closed = False
                    self._changed.notify_all()


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
