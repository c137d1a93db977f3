# SPDX-License-Identifier: Apache-2.0
"""`vllm.model_executor.model_loader.base_loader`: a model is shown between the loading of its
weights and their processing, in which vLLM packs each layer's weight for its kernels and frees it.
It can go when vLLM has a hook there.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

from torch import nn
from vllm.model_executor.model_loader import base_loader


def loaded_model_is_shown(
    model_config: Any, show: Callable[[nn.Module], None]
) -> AbstractContextManager[object]:
    """While vLLM loads models: `show(model)` for the one of this configuration, no other."""
    original = base_loader.process_weights_after_loading

    @functools.wraps(original)
    def process(model: nn.Module, of: Any, *args: Any, **kwargs: Any) -> Any:
        if of is model_config:
            show(model)
        return original(model, of, *args, **kwargs)

    return patch.object(base_loader, "process_weights_after_loading", process)
