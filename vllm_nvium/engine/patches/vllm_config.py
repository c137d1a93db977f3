# SPDX-License-Identifier: Apache-2.0
"""`vllm.config.vllm.VllmConfig`: an engine with VIA-SD uses Model Runner V1 where vLLM would choose
V2. The configuration reaches every process of its engine and no other, which the environment
variable for it does not: set here, it would stay for the next engine of this process."""

import functools
from collections.abc import Callable
from typing import Any

from vllm_nvium.engine.patches import Patch
from vllm_nvium.via_sd.options import is_on


def _v1_with_via_sd(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def use_v2_model_runner(self: Any) -> bool:
        import vllm.envs as envs

        # Who set the variable has chosen, and is told at start when it is the wrong one.
        if envs.VLLM_USE_V2_MODEL_RUNNER is None and is_on(self.additional_config):
            return False
        return bool(original(self))

    return use_v2_model_runner


PATCHES = (
    Patch(
        "vllm.config.vllm",
        "VllmConfig",
        "use_v2_model_runner",
        _v1_with_via_sd,
        without="VIA-SD is refused wherever vLLM's default is Model Runner V2",
        until="VIA-SD runs on Model Runner V2",
        kind=property,
    ),
)
