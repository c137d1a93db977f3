# SPDX-License-Identifier: Apache-2.0
"""What a replica makes of a row before its engine sees it."""

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray")

from vllm_nvium.batch.attempts import Turns
from vllm_nvium.batch.replica import Replica
from vllm_nvium.batch.rows import COMPLETION


async def _never(request: Any) -> Any:
    raise AssertionError(f"the engine was given {request}")


def test_what_vllm_refuses_is_one_sentence() -> None:
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    replica: Any = object.__new__(Replica)
    replica._handlers, replica._seed = {COMPLETION: (CompletionRequest, _never)}, 0
    engine = SimpleNamespace(engine=SimpleNamespace(errored=False), shutdown=lambda: None)
    replica.llm = engine
    text = json.dumps({"custom_id": "a", "prompt": "w3", "max_tokens": "many"}).encode()
    result = asyncio.run(replica._result(0, text))
    found = result["error"]["message"]
    assert found.startswith("max_tokens: Input should be a valid integer")
    assert found.endswith(".") and "\n" not in found
    assert result["custom_id"] == "a" and result["response"]["status_code"] == 400


def test_a_row_on_its_last_attempt_is_alone_in_its_engine() -> None:
    """Two suspected rows never run at a time; others may run beside one until its last attempt."""
    log: list[str] = []

    class Row:
        """One that runs until it is told to end."""

        def __init__(self, turn: Any, name: str) -> None:
            self.name, self.told = name, asyncio.Event()
            self.task = asyncio.create_task(self.run(turn))

        async def run(self, turn: Any) -> None:
            async with turn:
                log.append(f"{self.name} begins")
                await self.told.wait()
                log.append(f"{self.name} ends")

        async def end(self) -> None:
            self.told.set()
            await self.task
            await settled()

    async def settled() -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    async def all_rows() -> None:
        turns = Turns()
        a, b = Row(turns.beside(), "a"), Row(turns.one_by_one(alone=False), "b")
        await settled()
        c, d = Row(turns.one_by_one(alone=True), "c"), Row(turns.beside(), "d")
        await settled()
        await a.end()
        await b.end()
        e, f = Row(turns.beside(), "e"), Row(turns.one_by_one(alone=True), "f")
        await settled()
        assert log == ["a begins", "b begins", "d begins", "a ends", "b ends"]
        f.task.cancel()
        await d.end()
        await c.end()
        await e.end()
        await Row(turns.beside(), "g").end()

    asyncio.run(asyncio.wait_for(all_rows(), 20))
    assert log[5:] == [
        *("d ends", "c begins", "c ends", "e begins", "e ends", "g begins", "g ends"),
    ]
