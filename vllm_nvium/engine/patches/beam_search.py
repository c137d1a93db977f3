# SPDX-License-Identifier: Apache-2.0
"""`to_beam_search_params` of vLLM's requests: a beam search that carries options of N-vium or of
VIA-SD is refused. vLLM drops `vllm_xargs` there, so that nobody else sees them."""

import functools
from collections.abc import Callable
from typing import Any

from vllm_nvium.engine.feature import features
from vllm_nvium.engine.options import picked, shown
from vllm_nvium.engine.patches import Patch


def _is_own(key: str) -> bool:
    return any(feature.is_own(key) for feature in features())


def _without_own_options(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def to_beam_search_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        for key, value in picked(self.vllm_xargs, _is_own).items():
            from vllm.exceptions import VLLMValidationError

            raise VLLMValidationError(
                f"vllm_xargs {shown(key)} is {shown(value)}, but use_beam_search is true and beams "
                "take no vllm_xargs; leave one of them out."
            )
        return original(self, *args, **kwargs)

    return to_beam_search_params


PATCHES = tuple(
    Patch(
        f"vllm.entrypoints.{module}.protocol",
        owner,
        "to_beam_search_params",
        _without_own_options,
        without="options of N-vium and of VIA-SD in a beam search are dropped without a word",
        until="beam search takes vllm_xargs, or vLLM refuses them itself",
    )
    for module, owner in (
        ("openai.completion", "CompletionRequest"),
        ("openai.chat_completion", "ChatCompletionRequest"),
        ("speech_to_text.transcription", "TranscriptionRequest"),
        ("speech_to_text.translation", "TranslationRequest"),
    )
)
