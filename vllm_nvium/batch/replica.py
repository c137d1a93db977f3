# SPDX-License-Identifier: Apache-2.0
"""One replica of a batch job's engine: Ray Data's vLLM stage, which starts the engine and restarts
it when it dies, with vLLM's own OpenAI layer in place of Ray's requests. So rows mean what they
mean to `vllm serve`, and answers have usage, finish reasons, several choices and tool calls."""

import asyncio
import json
import os
import pickle
import time
import uuid
from argparse import Namespace
from collections.abc import AsyncIterator
from typing import Any, NoReturn

from pydantic import ValidationError
from ray.llm._internal.batch.stages.vllm_engine_stage import vLLMEngineStageUDF

from vllm_nvium.batch.attempts import ALONE_FROM, MOST, Attempts, Turns
from vllm_nvium.batch.results import answered, encoded, failed
from vllm_nvium.batch.rows import (
    CHAT,
    COMPLETION,
    Row,
    check_known,
    first_of,
    name_of,
    read_fields,
    read_row,
    row_seed,
)
from vllm_nvium.errors import UserError

# What is counted since the engine was started, as Prometheus calls it -> as progress does.
COUNTERS = {
    "vllm:nvium_row_layers_total": "layers",
    "vllm:nvium_dense_row_layers_total": "dense_layers",
    "vllm:spec_decode_num_draft_tokens_total": "drafted",
    "vllm:spec_decode_num_accepted_tokens_total": "accepted",
}
SECONDS_BETWEEN_COUNTS = 1.0


class Replica(vLLMEngineStageUDF):
    """Ray Data's stage, from rows as they stand in the input to results.

    Args:
        frontend: flags of vLLM's OpenAI layer, pickled: Ray unpacks arguments in processes that
            would have to import vLLM for them.
        seed: rows without a seed get one from this and their place; None leaves them without.
        attempts: counts how often rows were begun.
    """

    def __init__(
        self,
        *args: Any,
        frontend: bytes,
        seed: int | None,
        attempts: Attempts,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._frontend, self._seed, self._attempts = frontend, seed, attempts
        self._name = uuid.uuid4().hex
        self._begun = self._counted_at = 0.0
        self._handlers: dict[str, tuple[Any, Any]] = {}
        self._starting = asyncio.Lock()
        self._turns = Turns()

    def validate_inputs(self, inputs: list[dict[str, Any]]) -> None:
        """Rows are checked one by one; a bad one gets an error."""

    async def udf(self, batch: list[dict[str, Any]]) -> AsyncIterator[dict[str, Any]]:
        """Answer rows.

        Args:
            batch: `index` and `text` of each.

        Yields:
            `result` of a row, and in some rows the `counts` of this replica; as they finish.
        """
        async with self._starting:
            if not self._handlers:
                self._handlers = await self._start()
                self._begun = time.time()
        indices = [int(row["index"]) for row in batch]
        before = await self._attempts.begin(indices)
        tasks = [
            asyncio.create_task(self._run(row, count))
            for row, count in zip(batch, before, strict=True)
        ]
        for finished in asyncio.as_completed(tasks):
            yield await finished
        await self._attempts.finish(indices)

    async def _start(self) -> dict[str, tuple[Any, Any]]:
        """Request class and handler of each url."""
        from starlette.datastructures import State
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest

        state: Any = State()
        engine = self.llm.engine
        tasks = await engine.get_supported_tasks()
        await init_app_state(engine, state, Namespace(**pickle.loads(self._frontend)), tasks)
        chat, completion = state.openai_serving_chat, state.openai_serving_completion
        return {
            CHAT: (ChatCompletionRequest, chat and chat.create_chat_completion),
            COMPLETION: (CompletionRequest, completion and completion.create_completion),
        }

    async def _run(self, row: dict[str, Any], before: int) -> dict[str, Any]:
        index = int(row["index"])
        if ALONE_FROM <= before < MOST:
            # The last attempt is alone in its engine: no other row's fault may count as its own.
            async with self._turns.one_by_one(alone=before == MOST - 1):
                await self._attempts.begin([index], alone=True)
                result = await self._result(index, row["text"])
                await self._attempts.finish([index])
        else:
            async with self._turns.beside():
                result = await self._result(index, row["text"], before)
        return {
            self.IDX_IN_BATCH_COLUMN: row[self.IDX_IN_BATCH_COLUMN],
            "result": encoded(result),
            "counts": self._counts(),
        }

    async def _result(self, index: int, text: bytes, before: int = 0) -> dict[str, Any]:
        """The result of a row, whatever is wrong with it."""
        from vllm.entrypoints.serve import create_error_response
        from vllm.v1.engine.exceptions import EngineDeadError

        custom_id = None
        try:
            fields = read_fields(text)
            custom_id = name_of(fields)
            if before >= MOST:
                raise UserError(
                    f"the engine ended {before} times while this row ran, so it is left out."
                )
            seed = None if self._seed is None else row_seed(self._seed, index)
            response = await self._response(read_row(fields, seed))
            if not hasattr(response, "error"):
                return answered(index, custom_id, response.model_dump(mode="json"))
        except EngineDeadError:
            _end_process()
        except UserError as error:
            return failed(index, custom_id, str(error))
        except Exception as error:  # noqa: BLE001 - a bad row must not stop the job
            response = create_error_response(error)
        if self.llm.engine.errored:
            _end_process()
        reason = response.error
        return failed(index, custom_id, reason.message, reason.code, reason.type)

    async def _response(self, row: Row) -> Any:
        """vLLM's, with an `error` if it is one."""
        request_class, handler = self._handlers[row.url]
        if handler is None:
            raise UserError(f"the model has no {row.url}, because it does not generate text.")
        check_known(row.body, frozenset(request_class.model_fields))
        try:
            request = request_class.model_validate(row.body)
        except ValidationError as error:
            raise UserError(f"{first_of(error)}.") from None
        return await handler(request)

    def _counts(self) -> str:
        """What the engine counted, as JSON, once a second; empty in between."""
        now = time.monotonic()
        if now - self._counted_at < SECONDS_BETWEEN_COUNTS:
            return ""
        self._counted_at = now
        from prometheus_client import REGISTRY

        counts: dict[str, Any] = {"replica": self._name, "begun": self._begun}
        for metric in REGISTRY.collect():
            for sample in metric.samples:
                if name := COUNTERS.get(sample.name):
                    counts[name] = counts.get(name, 0) + sample.value
        return json.dumps(counts)


def _end_process() -> NoReturn:
    """What a replica does whose engine is dead: Ray starts another in its place, and gives it the
    rows that this one had. An exception would be taken for the rows' own."""
    os._exit(1)
