# SPDX-License-Identifier: Apache-2.0
"""`vllm.config.vllm.VllmConfig`: an engine with VIA-SD uses Model Runner V1 where vLLM would choose
V2. The configuration reaches every process of its engine and no other, which the environment
variable for it does not: set here, it would stay for the next engine of this process."""

import functools
from collections.abc import Callable
from typing import Any

from vllm_nvium.engine.feature import features
from vllm_nvium.engine.patches import Patch


def _v1_where_needed(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def use_v2_model_runner(self: Any) -> bool:
        import vllm.envs as envs

        # Who set the variable has chosen, and is told at start when it is the wrong one.
        if envs.VLLM_USE_V2_MODEL_RUNNER is None and any(
            feature.needs_runner_v1(self.additional_config) for feature in features()
        ):
            return False
        return bool(original(self))

    return use_v2_model_runner


PATCHES = (
    Patch(
        "vllm.config.vllm",
        "VllmConfig",
        "use_v2_model_runner",
        _v1_where_needed,
        without="VIA-SD is refused wherever vLLM's default is Model Runner V2",
        until="VIA-SD runs on Model Runner V2",
        kind=property,
    ),
)
