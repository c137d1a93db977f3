# SPDX-License-Identifier: Apache-2.0
"""The changes made to classes of vLLM, one file per class. Each says what fails without it and when
it can go; each is applied once per process and only wraps, so that other models see vLLM's own
behaviour."""

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger("vllm.nvium")

_MARK = "__vllm_nvium_original__"


@dataclass(frozen=True)
class Patch:
    """Replace `module:class_name.method` by `wrap(original)`.

    `kind` is what the method is in its class (staticmethod, classmethod, property or a plain
    function), so that it is put back as the same.
    """

    module: str
    class_name: str
    method: str
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
    without: str
    until: str
    kind: Callable[[Callable[..., Any]], Any] = lambda function: function

    def apply(self) -> bool:
        """Apply it; False when it was applied in this process before."""
        owner = getattr(importlib.import_module(self.module), self.class_name)
        original = owner.__dict__[self.method]
        function: Any = getattr(original, "__func__", original)
        if isinstance(original, property):
            function = original.fget
        if hasattr(function, _MARK):
            return False
        wrapped = self.wrap(function)
        setattr(wrapped, _MARK, function)
        setattr(owner, self.method, self.kind(wrapped))
        logger.debug("wrapped %s.%s: %s", self.class_name, self.method, self.without)
        return True


def all_patches() -> tuple[Patch, ...]:
    """Every patch of this folder."""
    from vllm_nvium.engine.patches import (
        async_llm,
        beam_search,
        engine_args,
        input_processor,
        model_runner_v2,
        openai_serving,
        output_processor,
        responses,
        scheduler,
        stat_loggers,
        vllm_config,
        worker,
    )

    modules = (
        engine_args,
        vllm_config,
        input_processor,
        async_llm,
        responses,
        beam_search,
        scheduler,
        stat_loggers,
        worker,
        model_runner_v2,
        output_processor,
        openai_serving,
    )
    return tuple(patch for module in modules for patch in module.PATCHES)
