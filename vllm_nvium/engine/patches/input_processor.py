# SPDX-License-Identifier: Apache-2.0
"""`vllm.v1.engine.input_processor.InputProcessor`: per-request options of N-vium and of VIA-SD are
checked in the process that answers the client, and vLLM's own checks know that VIA-SD samples as
plain decoding does. Without it a bad override would surface in the engine core, where an exception
ends the server."""

import functools
from collections.abc import Callable
from typing import Any

from vllm_nvium.engine.feature import features, running
from vllm_nvium.engine.patches import Patch


def check(params: Any, vllm_config: Any) -> None:
    """Raise vLLM's VLLMValidationError for a request whose overrides this engine refuses: among
    them every option of a method that the engine has not."""
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams

    if not isinstance(params, SamplingParams):
        return
    try:
        if running(vllm_config) is not None:
            check_seed(params, vllm_config.use_v2_model_runner)
        for feature in features():
            feature.validate_request(params, vllm_config)
    except ValueError as error:
        # The server answers this class with 400, a plain ValueError not in every route.
        raise VLLMValidationError(str(error)) from None


def check_seed(params: Any, is_v2: bool) -> None:
    """vLLM counts upwards from the seed of a request for its n answers, and what the integers of a
    model runner cannot hold ends its engine: torch's of V1, those of an array of V2.

    Raises:
        ValueError: one sentence.
    """
    least, most = -(2**63), (2**63 if is_v2 else 2**64) - 1
    if params.seed is not None and not least <= params.seed <= most - (params.n - 1):
        raise ValueError(
            f"seed is {params.seed}, and with n = {params.n} it must be from {least} to "
            f"{most - (params.n - 1)}."
        )


def _with_own_options(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _validate_params(self: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        if self.speculative_config is not None:
            method = running(self.vllm_config)
            if method is not None and method.samples_as_plain:
                # Read by these checks only, which refuse what a rejection sampler cannot apply.
                self.speculative_config = None
        resolved = original(self, params, *args, **kwargs)
        check(params, self.vllm_config)
        return resolved

    return _validate_params


PATCHES = (
    Patch(
        "vllm.v1.engine.input_processor",
        "InputProcessor",
        "_validate_params",
        _with_own_options,
        without="a bad per-request override reaches the engine core, and VIA-SD refuses min_p and "
        "logit_bias",
        until="a model class can validate sampling parameters",
    ),
)
