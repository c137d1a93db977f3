# SPDX-License-Identifier: Apache-2.0
"""`vllm.v1.metrics.loggers.StatLoggerManager`: where a method is on, its own logger beside vLLM's.
vLLM's plugin group for loggers is not used: a class in it switches statistics on for every model
that is started with --disable-log-stats, and `LLM` does not read it."""

import functools
from collections.abc import Callable
from typing import Any

from vllm_nvium.engine.feature import features
from vllm_nvium.engine.patches import Patch


def _with_own_loggers(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        # As vLLM decides on its own lines: each of several API processes sees a part only.
        logs = kwargs.get("enable_default_loggers", True) and kwargs.get("client_count", 1) == 1
        for feature in features():
            own = feature.make_stat_logger(vllm_config, self.engine_indexes, logs)
            if own is not None:
                self.stat_loggers.insert(0, own)

    return __init__


PATCHES = (
    Patch(
        "vllm.v1.metrics.loggers",
        "StatLoggerManager",
        "__init__",
        _with_own_loggers,
        without="no metrics of VIA-SD, and vLLM's loggers fail on statistics meant for ours",
        until="vLLM asks a logger plugin whether it wants an engine, and reads them in LLM too",
    ),
)
