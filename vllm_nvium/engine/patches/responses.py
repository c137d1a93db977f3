# SPDX-License-Identifier: Apache-2.0
"""`vllm.entrypoints.openai.responses.serving.OpenAIServingResponses`: as `async_llm`, for the
Responses API, whose streamed and background answers call `generate` when their status is sent. And
of requests to be told of their tokens, which have no place in its answers nor in those of
`/inference/v1/generate`, a clear refusal."""

import functools
from collections.abc import Callable
from typing import Any

from vllm_nvium.engine.feature import running
from vllm_nvium.engine.patches import Patch
from vllm_nvium.engine.patches.input_processor import check
from vllm_nvium.engine.request_metrics import OPTION


def _refuse_request_metrics(params: Any, vllm_config: Any, where: str) -> None:
    """What a request wants to be told of its tokens would be dropped without a word.

    Args:
        where: what has no place for it, as the message names it.
    """
    method = running(vllm_config)
    if method is None or method.answers is None or not getattr(params, "extra_args", None):
        return
    key = f"{method.answers.sums}_{OPTION}"
    if (value := params.extra_args.get(key)) in (None, "none"):
        return
    from vllm.exceptions import VLLMValidationError

    raise VLLMValidationError(
        f"vllm_xargs {key!r} is {value!r}, but {where} has no place for an answer to it; "
        "remove it, or ask for a completion or a chat completion."
    )


def _checked_at_once(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _generate_with_builtin_tools(self: Any, *args: Any, **kwargs: Any) -> Any:
        # vLLM passes everything by name; what came otherwise is still checked by `generate`.
        params, vllm_config = kwargs.get("sampling_params"), self.engine_client.vllm_config
        check(params, vllm_config)
        _refuse_request_metrics(params, vllm_config, "the Responses API")
        return original(self, *args, **kwargs)

    return _generate_with_builtin_tools


def _asked_for_tokens(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    async def serve_tokens(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        vllm_config = self.engine_client.vllm_config
        _refuse_request_metrics(request.sampling_params, vllm_config, "/inference/v1/generate")
        return await original(self, request, *args, **kwargs)

    return serve_tokens


PATCHES = (
    Patch(
        "vllm.entrypoints.openai.responses.serving",
        "OpenAIServingResponses",
        "_generate_with_builtin_tools",
        _checked_at_once,
        without="a bad override of a streamed response is answered with 200 and an error event",
        until="a model class can validate sampling parameters",
    ),
    Patch(
        "vllm.entrypoints.scale_out.token_in_token_out.serving",
        "ServingTokens",
        "serve_tokens",
        _asked_for_tokens,
        without="what a request of /inference/v1/generate asks to be told of its tokens is dropped",
        until="vLLM copies fields that it does not know from an output to the response",
    ),
)
