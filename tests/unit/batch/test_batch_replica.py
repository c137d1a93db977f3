# SPDX-License-Identifier: Apache-2.0
"""What a replica makes of a row before its engine sees it."""

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray")

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
