# SPDX-License-Identifier: Apache-2.0
"""`to_beam_search_params` of vLLM's completion and chat requests: a beam search that carries
options of VIA-SD is refused. vLLM drops `vllm_xargs` there, so that nobody else sees them."""

import functools
from collections.abc import Callable
from typing import Any

from vllm_nvium.patches import Patch
from vllm_nvium.spec_decode import options as via_sd


def _without_own_options(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def to_beam_search_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        for key, value in via_sd.additional_keys(self.vllm_xargs).items():
            from vllm.exceptions import VLLMValidationError

            raise VLLMValidationError(
                f"vllm_xargs {key!r} is {value!r}, but use_beam_search is true and beams take no "
                "vllm_xargs; leave one of them out."
            )
        return original(self, *args, **kwargs)

    return to_beam_search_params


PATCHES = tuple(
    Patch(
        f"vllm.entrypoints.openai.{module}.protocol",
        owner,
        "to_beam_search_params",
        _without_own_options,
        without="options of VIA-SD in a beam search are dropped without a word",
        until="beam search takes vllm_xargs, or vLLM refuses them itself",
    )
    for module, owner in (
        ("completion", "CompletionRequest"),
        ("chat_completion", "ChatCompletionRequest"),
    )
)
