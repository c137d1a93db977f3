# SPDX-License-Identifier: Apache-2.0
"""`vllm.v1.metrics.loggers.StatLoggerManager`: where VIA-SD is on, its own logger beside vLLM's.
vLLM's plugin group for loggers is not used: a class in it switches statistics on for every model
that is started with --disable-log-stats, and `LLM` does not read it."""

import functools
from collections.abc import Callable
from typing import Any

from vllm_nvium.engine.patches import Patch
from vllm_nvium.via_sd.options import options_of


def _with_via_sd(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        if options_of(vllm_config) is None:
            return
        from vllm_nvium.via_sd.stats import ViaSDStatLogger

        # As vLLM decides on its own lines: each of several API processes sees a part only.
        logs = kwargs.get("enable_default_loggers", True) and kwargs.get("client_count", 1) == 1
        own = ViaSDStatLogger(vllm_config, self.engine_indexes, logs=logs)
        self.stat_loggers.insert(0, own)

    return __init__


PATCHES = (
    Patch(
        "vllm.v1.metrics.loggers",
        "StatLoggerManager",
        "__init__",
        _with_via_sd,
        without="no metrics of VIA-SD, and vLLM's loggers fail on statistics meant for ours",
        until="vLLM asks a logger plugin whether it wants an engine, and reads them in LLM too",
    ),
)
