# SPDX-License-Identifier: Apache-2.0
"""`vllm.v1.engine.output_processor.RequestState` and `vllm.outputs.RequestOutput`: what came of a
request's tokens stands in its outputs, where it asked for it. vLLM has no field for that and drops
what it does not know; all that is counted is counted behind its own stop checks."""

import functools
from collections.abc import Callable
from typing import Any

from vllm_nvium.engine.feature import answer_format, answer_formats
from vllm_nvium.engine.patches import Patch
from vllm_nvium.engine.request_metrics import KEY, Told, received


def _taking_the_note(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def make_request_output(
        self: Any,
        new_token_ids: list[int],
        pooling_output: Any,
        finish_reason: Any,
        stop_reason: Any,
        kv_transfer_params: dict[str, Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if (note := received(kv_transfer_params)) is not None:
            kv_transfer_params = None
            told = vars(self).setdefault(KEY, Told())
            # What a stop string has cut off is gone from both by now.
            count = len(new_token_ids)
            told.add(note, self.detokenizer.num_output_tokens() - count, count)
        return original(
            self,
            new_token_ids,
            pooling_output,
            finish_reason,
            stop_reason,
            kv_transfer_params,
            *args,
            **kwargs,
        )

    return make_request_output


def _describing(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _new_completion_output(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        told: Told | None = vars(self).get(KEY)
        if told is not None and (form := answer_format(told.method)) is not None:
            form.describe(output, told, self.detokenizer.num_output_tokens())
        return output

    return _new_completion_output


def _merging(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def add(self: Any, next_output: Any, aggregate: bool) -> None:
        # Outputs that are not aggregated are replaced as a whole.
        before = {output.index: output for output in self.outputs} if aggregate else {}
        original(self, next_output, aggregate)
        for newer in next_output.outputs:
            if (output := before.get(newer.index)) is not None:
                for form in answer_formats():
                    form.merge(output, newer)

    return add


PROCESSOR = "vllm.v1.engine.output_processor"
PATCHES = tuple(
    Patch(
        module,
        owner,
        method,
        wrap,
        without="a request cannot be told of its own exits or tiers",
        until="vLLM lets a model runner add a value for each token to the output of a request",
    )
    for module, owner, method, wrap in (
        (PROCESSOR, "RequestState", "make_request_output", _taking_the_note),
        (PROCESSOR, "RequestState", "_new_completion_output", _describing),
        ("vllm.outputs", "RequestOutput", "add", _merging),
    )
)
