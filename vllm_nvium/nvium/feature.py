# SPDX-License-Identifier: Apache-2.0
"""N-vium as a `Feature`: everything that the engine's plumbing asks of it."""

from typing import TYPE_CHECKING, Any

from vllm_nvium.engine.feature import Feature
from vllm_nvium.errors import UserError
from vllm_nvium.nvium import as_drafter, options
from vllm_nvium.nvium.hooks import HOOKS
from vllm_nvium.nvium.request_metrics import FORMAT

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def _check(vllm_config: "VllmConfig") -> None:
    """What an N-vium model itself is refused for is asked earlier; see `start.py`."""
    as_drafter.check_drafter(vllm_config)
    given, model = options.additional_keys(vllm_config), vllm_config.model_config
    if given and model is not None and not options.is_nvium(vllm_config):
        key, value = next(iter(given.items()))
        raise UserError(
            f"--{key.replace('_', '-')} (additional_config {key!r}) is {value!r}, but "
            f"{model.model} is a {model.architecture} and the option works on "
            f"{options.ARCHITECTURE} only; remove it."
        )


def _make_stat_logger(vllm_config: "VllmConfig", engine_indexes: Any, logs: bool) -> Any | None:
    if not options.is_nvium(vllm_config):
        return None
    from vllm_nvium.nvium.stats import make_stat_logger

    return make_stat_logger(vllm_config, engine_indexes, logs)


NVIUM = Feature(
    name="N-vium",
    folder="nvium",
    hooks=HOOKS,
    keys=options.KEYS,
    is_own=options.is_own,
    add_arguments=options.add_arguments,
    validate_request=options.validate_request,
    is_on=options.is_nvium,
    check_engine_args=as_drafter.refuse_nvium_drafter,
    check=_check,
    make_stat_logger=_make_stat_logger,
    answers=FORMAT,
    leaves_open=True,
)
