# SPDX-License-Identifier: Apache-2.0
"""N-vium (mixture-of-exits) models and VIA-SD (speculative decoding with a slim verifier) on an
unmodified vLLM.

The names of `__all__` are the public interface: they change only with a minor version, and are
imported when they are first used. Importing this package imports neither vLLM nor torch; vLLM
reaches it through the entry point in `plugin.py`.
"""

from typing import TYPE_CHECKING, Any

from vllm_nvium.errors import UserError
from vllm_nvium.version import __version__

if TYPE_CHECKING:
    from vllm_nvium.checkpoints.convert import convert
    from vllm_nvium.checkpoints.convert.options import DenseOptions
    from vllm_nvium.checkpoints.evaluate.checkpoint import evaluate
    from vllm_nvium.checkpoints.evaluate.request import Request as EvaluateRequest
    from vllm_nvium.checkpoints.mask_search.find import find_mask as search_mask
    from vllm_nvium.checkpoints.mask_search.request import SearchRequest
    from vllm_nvium.checkpoints.train.options import TrainOptions
    from vllm_nvium.checkpoints.train.run import train
    from vllm_nvium.model_executor.models.configuration_nvium import NviumConfig
    from vllm_nvium.model_executor.models.nvium_reference import (
        load_reference,
        register_with_transformers,
    )
    from vllm_nvium.nvium.options import NviumOptions
    from vllm_nvium.via_sd.options import ViaSDOptions

__all__ = [
    "DenseOptions",
    "EvaluateRequest",
    "NviumConfig",
    "NviumOptions",
    "SearchRequest",
    "TrainOptions",
    "UserError",
    "ViaSDOptions",
    "__version__",
    "convert",
    "evaluate",
    "load_reference",
    "register_with_transformers",
    "search_mask",
    "train",
]

# Public name -> module below this package, and its name there.
_WHERE = {
    "DenseOptions": ("checkpoints.convert.options", "DenseOptions"),
    "EvaluateRequest": ("checkpoints.evaluate.request", "Request"),
    "NviumConfig": ("model_executor.models.configuration_nvium", "NviumConfig"),
    "NviumOptions": ("nvium.options", "NviumOptions"),
    "SearchRequest": ("checkpoints.mask_search.request", "SearchRequest"),
    "TrainOptions": ("checkpoints.train.options", "TrainOptions"),
    "ViaSDOptions": ("via_sd.options", "ViaSDOptions"),
    "convert": ("checkpoints.convert", "convert"),
    "evaluate": ("checkpoints.evaluate.checkpoint", "evaluate"),
    "load_reference": ("model_executor.models.nvium_reference", "load_reference"),
    "register_with_transformers": (
        "model_executor.models.nvium_reference",
        "register_with_transformers",
    ),
    "search_mask": ("checkpoints.mask_search.find", "find_mask"),
    "train": ("checkpoints.train.run", "train"),
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    module, attribute = _WHERE[name]
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
