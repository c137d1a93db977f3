# SPDX-License-Identifier: Apache-2.0
"""`vllm.v1.engine.input_processor.InputProcessor`: per-request options of N-vium are checked in the
process that answers the client. Without it a bad override would surface in the engine core, where
an exception ends the server."""

import functools
from collections.abc import Callable
from typing import Any

from vllm_nvium.flags import is_nvium, validate_request
from vllm_nvium.patches import Patch


def _with_nvium_options(original: Callable[..., Any]) -> Callable[..., Any]:
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams

    @functools.wraps(original)
    def _validate_params(self: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        resolved = original(self, params, *args, **kwargs)
        if isinstance(params, SamplingParams) and is_nvium(self.vllm_config):
            try:
                validate_request(params, self.vllm_config)
            except ValueError as error:
                # The server answers this class with 400, a plain ValueError not in every route.
                raise VLLMValidationError(str(error)) from None
        return resolved

    return _validate_params


PATCHES = (
    Patch(
        "vllm.v1.engine.input_processor",
        "InputProcessor",
        "_validate_params",
        _with_nvium_options,
        without="a bad per-request override reaches the engine core",
        until="a model class can validate sampling parameters",
    ),
)
