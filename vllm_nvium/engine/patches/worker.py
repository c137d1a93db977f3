# SPDX-License-Identifier: Apache-2.0
"""`vllm.v1.worker.gpu_worker.Worker`, from which the CPU worker is derived: a model that has
noticed something about its weights is told when they were written. vLLM writes some updates in
place, and no method of the model is called."""

import functools
from collections.abc import Callable
from typing import Any

from vllm_nvium.engine.patches import Patch


def _tell_the_model(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def write_weights(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        finally:
            weights_changed = getattr(self.get_model(), "weights_changed", None)
            if weights_changed is not None:
                weights_changed()

    return write_weights


PATCHES = tuple(
    Patch(
        "vllm.v1.worker.gpu_worker",
        "Worker",
        method,
        _tell_the_model,
        without="an N-vium model whose routers were constant keeps their hazards after an update",
        until="vLLM calls a method of the model after it has written weights in place",
    )
    for method in ("reload_weights", "update_weights", "finish_weight_update")
)
