# SPDX-License-Identifier: Apache-2.0
"""`OpenAIServingCompletion`, `OpenAIServingChat` and `OpenAIServingChatBatch` of vLLM: what an
output tells of its tokens stands in the response too. vLLM makes responses field by field, whole
ones and chunks, and has no place where one could be added; all their models take extra fields."""

import functools
import inspect
import json
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import aclosing
from typing import Any

from vllm_nvium.engine.feature import running
from vllm_nvium.engine.patches import Patch
from vllm_nvium.engine.request_metrics import AnswerFormat, Level

EVENT = "data: "


def _asked(serving: Any, request: Any) -> tuple[AnswerFormat | None, Level]:
    """How to answer this request, and what it asks for; None where it asks for nothing."""
    vllm_config = serving.engine_client.vllm_config
    method = running(vllm_config)
    form = None if method is None else method.answers
    # A batch of chats has no such field, and the attribute only where a client gives it.
    asked = getattr(request, "vllm_xargs", None)
    level: Level = "none" if form is None else form.level(asked, vllm_config)
    return (None if level == "none" else form), level


def _add(form: AnswerFormat, response: Any, outputs: Iterable[Any], is_single: bool) -> None:
    """Adds to a whole response what its outputs tell.

    Args:
        outputs: in the order of the response's choices.
        is_single: one prompt has one answer: vLLM describes no other in `metrics`.
    """
    for choice, output in zip(response.choices, outputs, strict=True):
        found = vars(output)
        if form.tokens in found:
            setattr(choice, form.tokens, found[form.tokens])
        if is_single and form.sums_attribute in found:
            from vllm.entrypoints.generate.base.protocol import PerRequestMetrics

            response.metrics = response.metrics or PerRequestMetrics()
            setattr(response.metrics, form.sums, found[form.sums_attribute])


class _Stream:
    """Events of a streamed response, with what its outputs tell.

    Args:
        num_choices: of each prompt.
    """

    def __init__(self, form: AnswerFormat, num_choices: int) -> None:
        self.form, self.num_choices = form, num_choices
        self.is_single = num_choices == 1
        # What no event has carried yet, by choice.
        self._waiting: dict[int, list[Any]] = {}
        self._sums: dict[str, Any] | None = None

    def seen(self, result: Any) -> None:
        """vLLM is about to make events of a result: an output, or a prompt's number and one."""
        prompt, output = result if isinstance(result, tuple) else (0, result)
        self.is_single &= prompt == 0
        for one in output.outputs:
            found = vars(one)
            choice = one.index + prompt * self.num_choices
            self._waiting.setdefault(choice, []).extend(found.get(self.form.tokens, ()))
            self._sums = found.get(self.form.sums_attribute, self._sums)

    def event(self, text: str, with_tokens: bool) -> str:
        """An event, with what belongs to it. Those of tokens are those with a place for ids of
        tokens; sums go where vLLM has its own, into the one behind the last token."""
        if not text.startswith(EVENT + "{"):
            return text
        body = json.loads(text.removeprefix(EVENT))
        for choice in body.get("choices", ()):
            if with_tokens and "token_ids" in choice:
                choice[self.form.tokens] = self._waiting.pop(choice["index"], [])
        is_last = body.get("choices") == [] and "usage" in body
        if is_last and self.is_single and self._sums is not None:
            body["metrics"] = (body.get("metrics") or {}) | {self.form.sums: self._sums}
        return f"{EVENT}{json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


class _Watched:
    """An asynchronous iterator that shows what it gives.

    Attributes:
        last: what it gave last; None before.
    """

    def __init__(
        self, results: AsyncIterator[Any], see: Callable[[Any], None] = lambda _: None
    ) -> None:
        self._results, self._see = results, see
        self.last: Any = None

    def __aiter__(self) -> "_Watched":
        return self

    async def __anext__(self) -> Any:
        self.last = await anext(self._results)
        self._see(self.last)
        return self.last


def _streamed(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def generator(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        form, level = _asked(self, request)
        if form is None:
            return original(self, request, *args, **kwargs)
        stream = _Stream(form, request.n or 1)
        given = signature.bind(self, request, *args, **kwargs)
        given.arguments["result_generator"] = _Watched(
            given.arguments["result_generator"], stream.seen
        )

        async def events() -> AsyncIterator[str]:
            async with aclosing(original(**given.arguments)) as made:
                async for text in made:
                    yield stream.event(text, with_tokens=level == "detailed")

        return events()

    return generator


def _completion(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def request_output_to_completion_response(
        self: Any, final_res_batch: list[Any], request: Any, *args: Any, **kwargs: Any
    ) -> Any:
        response = original(self, final_res_batch, request, *args, **kwargs)
        form, _ = _asked(self, request)
        if form is not None:
            outputs = [output for result in final_res_batch for output in result.outputs]
            _add(form, response, outputs, is_single=len(outputs) == 1)
        return response

    return request_output_to_completion_response


def _chat(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    async def chat_completion_full_generator(
        self: Any, request: Any, result_generator: Any, *args: Any, **kwargs: Any
    ) -> Any:
        form, _ = _asked(self, request)
        if form is None:
            return await original(self, request, result_generator, *args, **kwargs)
        watched = _Watched(result_generator)
        response = await original(self, request, watched, *args, **kwargs)
        # Errors have no choices.
        if hasattr(response, "choices"):
            outputs = watched.last.outputs
            _add(form, response, outputs, is_single=len(outputs) == 1)
        return response

    return chat_completion_full_generator


def _chats(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    async def chat_completion_full_generator_batch(
        self: Any, request: Any, generators: list[Any], *args: Any, **kwargs: Any
    ) -> Any:
        form, _ = _asked(self, request)
        if form is None:
            return await original(self, request, generators, *args, **kwargs)
        watched = [_Watched(results) for results in generators]
        response = await original(self, request, watched, *args, **kwargs)
        if hasattr(response, "choices"):
            outputs = [output for results in watched for output in results.last.outputs]
            _add(form, response, outputs, is_single=len(outputs) == 1)
        return response

    return chat_completion_full_generator_batch


PATCHES = tuple(
    Patch(
        f"vllm.entrypoints.openai.{module}",
        owner,
        method,
        wrap,
        without="answers over HTTP do not tell of exits or tiers, whatever a request asks for",
        until="vLLM copies fields that it does not know from an output to the response",
    )
    for module, owner, method, wrap in (
        (
            "completion.serving",
            "OpenAIServingCompletion",
            "request_output_to_completion_response",
            _completion,
        ),
        ("completion.serving", "OpenAIServingCompletion", "completion_stream_generator", _streamed),
        ("chat_completion.serving", "OpenAIServingChat", "chat_completion_full_generator", _chat),
        (
            "chat_completion.serving",
            "OpenAIServingChat",
            "chat_completion_stream_generator",
            _streamed,
        ),
        (
            "chat_completion.batch_serving",
            "OpenAIServingChatBatch",
            "chat_completion_full_generator_batch",
            _chats,
        ),
    )
)
