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

    async def row(turn: Any, name: str, seconds: float) -> None:
        async with turn:
            log.append(f"{name} begins")
            await asyncio.sleep(seconds)
            log.append(f"{name} ends")

    async def all_rows() -> None:
        turns = Turns()
        rows = [row(turns.beside(), "a", 0.02), row(turns.one_by_one(alone=False), "b", 0.05)]
        rows += [row(turns.one_by_one(alone=True), "c", 0.02), row(turns.beside(), "d", 0.08)]
        tasks = [asyncio.create_task(each) for each in rows]
        await asyncio.sleep(0.06)  # b is done, and c waits for d
        tasks.append(asyncio.create_task(row(turns.beside(), "e", 0.0)))
        cancelled = asyncio.create_task(row(turns.one_by_one(alone=True), "f", 0.0))
        await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.gather(*tasks)
        await row(turns.beside(), "g", 0.0)

    asyncio.run(asyncio.wait_for(all_rows(), 20))
    assert log == [
        *("a begins", "b begins", "d begins", "a ends", "b ends", "d ends"),
        *("c begins", "c ends", "e begins", "e ends", "g begins", "g ends"),
    ]
