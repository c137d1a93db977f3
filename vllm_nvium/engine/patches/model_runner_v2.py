# SPDX-License-Identifier: Apache-2.0
"""`vllm.v1.worker.gpu.model_runner.GPUModelRunner`: Model Runner V2 sends along what its model
state reports of a step, where that has an observer. vLLM shows a model state no output."""

import functools
from collections.abc import Callable
from typing import Any

from vllm_nvium.engine.patches import Patch
from vllm_nvium.engine.request_metrics import KEY


def _reporting(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        observer = getattr(self.model_state, "observer", None)
        if observer is not None and output is not None:
            # With asynchronous scheduling the output is inside another.
            setattr(getattr(output, "model_runner_output", output), KEY, observer.report())
        return output

    return sample_tokens


PATCHES = (
    Patch(
        "vllm.v1.worker.gpu.model_runner",
        "GPUModelRunner",
        "sample_tokens",
        _reporting,
        without="no metrics of N-vium on Model Runner V2",
        until="vLLM lets a model state add to the output of a step",
    ),
)
