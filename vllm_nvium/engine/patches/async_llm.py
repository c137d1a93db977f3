# SPDX-License-Identifier: Apache-2.0
"""`vllm.v1.engine.async_llm.AsyncLLM`: per-request options are checked when the server calls
`generate`, not when it takes the first output. Without it a bad override of a streamed request
would be an error event inside an answer that already has status 200."""

import functools
from collections.abc import Callable
from typing import Any

from vllm_nvium.engine.patches import Patch
from vllm_nvium.engine.patches.input_processor import check


def _checked_at_once(original: Callable[..., Any]) -> Callable[..., Any]:
    # A plain function around an async generator: calling it runs the check, then makes the
    # generator, whose body waits for the first output to be asked for.
    @functools.wraps(original)
    def generate(self: Any, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        check(sampling_params, self.vllm_config)
        return original(self, prompt, sampling_params, *args, **kwargs)

    return generate


PATCHES = (
    Patch(
        "vllm.v1.engine.async_llm",
        "AsyncLLM",
        "generate",
        _checked_at_once,
        without="a bad override of a streamed request is answered with 200 and an error event",
        until="a model class can validate sampling parameters",
    ),
)
