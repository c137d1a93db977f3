# SPDX-License-Identifier: Apache-2.0
"""`vllm.entrypoints.openai.responses.serving.OpenAIServingResponses`: as `async_llm`, for the
Responses API, whose streamed and background answers call `generate` when their status is sent. And
a request to be told of its tokens is refused: such a response has no place for it."""

import functools
from collections.abc import Callable
from typing import Any

from vllm_nvium.engine.feature import running
from vllm_nvium.engine.patches import Patch
from vllm_nvium.engine.patches.input_processor import check
from vllm_nvium.engine.request_metrics import OPTION


def _refuse_request_metrics(params: Any, vllm_config: Any) -> None:
    """What a request wants to be told of its tokens would be dropped without a word."""
    method = running(vllm_config)
    if method is None or method.answers is None or not getattr(params, "extra_args", None):
        return
    key = f"{method.answers.sums}_{OPTION}"
    if (value := params.extra_args.get(key)) in (None, "none"):
        return
    from vllm.exceptions import VLLMValidationError

    raise VLLMValidationError(
        f"vllm_xargs {key!r} is {value!r}, but the Responses API has no place for an answer to it; "
        "remove it, or ask for a completion or a chat completion."
    )


def _checked_at_once(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _generate_with_builtin_tools(self: Any, *args: Any, **kwargs: Any) -> Any:
        # vLLM passes everything by name; what came otherwise is still checked by `generate`.
        params, vllm_config = kwargs.get("sampling_params"), self.engine_client.vllm_config
        check(params, vllm_config)
        _refuse_request_metrics(params, vllm_config)
        return original(self, *args, **kwargs)

    return _generate_with_builtin_tools


PATCHES = (
    Patch(
        "vllm.entrypoints.openai.responses.serving",
        "OpenAIServingResponses",
        "_generate_with_builtin_tools",
        _checked_at_once,
        without="a bad override of a streamed response is answered with 200 and an error event",
        until="a model class can validate sampling parameters",
    ),
)
