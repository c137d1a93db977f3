# SPDX-License-Identifier: Apache-2.0
"""`vllm.entrypoints.openai.responses.serving.OpenAIServingResponses`: as `async_llm`, for the
Responses API, whose streamed and background answers call `generate` when their status is sent."""

import functools
from collections.abc import Callable
from typing import Any

from vllm_nvium.engine.patches import Patch
from vllm_nvium.engine.patches.input_processor import check


def _checked_at_once(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _generate_with_builtin_tools(self: Any, *args: Any, **kwargs: Any) -> Any:
        # vLLM passes everything by name; what came otherwise is still checked by `generate`.
        check(kwargs.get("sampling_params"), self.engine_client.vllm_config)
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
