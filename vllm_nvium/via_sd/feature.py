# SPDX-License-Identifier: Apache-2.0
"""VIA-SD as a `Feature`: everything that the engine's plumbing asks of it."""

from typing import TYPE_CHECKING, Any

from vllm_nvium.engine.feature import Feature
from vllm_nvium.via_sd import options, start
from vllm_nvium.via_sd.hooks import HOOKS
from vllm_nvium.via_sd.request_metrics import FORMAT

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def _is_on(vllm_config: "VllmConfig") -> bool:
    return options.options_of(vllm_config) is not None


def _make_stat_logger(vllm_config: "VllmConfig", engine_indexes: Any, logs: bool) -> Any | None:
    if not _is_on(vllm_config):
        return None
    from vllm_nvium.via_sd.stats import make_stat_logger

    return make_stat_logger(vllm_config, engine_indexes, logs)


VIA_SD = Feature(
    name="VIA-SD",
    folder="via_sd",
    hooks=HOOKS,
    keys=options.KEYS,
    is_own=options.is_own,
    add_arguments=options.add_arguments,
    validate_request=options.validate_request,
    is_on=_is_on,
    prepared=start.prepared,
    check=start.check,
    instead_of=start.instead_of,
    make_stat_logger=_make_stat_logger,
    samples_as_plain=True,
    needs_runner_v1=options.is_on,
    answers=FORMAT,
)
