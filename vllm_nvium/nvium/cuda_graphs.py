# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs are off for N-vium models until they have been run on a GPU. A replayed graph answers
in memory that the next replay writes again, and in rows padded to a captured size, while the output
of a segment may wait for a catch-up pass and is cut by how many rows go on."""

import logging
from typing import TYPE_CHECKING, Any

from vllm_nvium.engine.unsupported import Unsupported, first_set

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.nvium")

WHY = "CUDA graphs of an N-vium model have not been run on a GPU yet"

# What asks for them. vLLM fills in its own defaults after this has been read, so that what is not
# None here was given.
ASKED: tuple[Unsupported, ...] = (
    Unsupported(
        "--compilation-config",
        lambda c: _mode(c.compilation_config.cudagraph_mode),
        WHY,
        "leave cudagraph_mode out or set it to NONE",
    ),
    Unsupported(
        "--cudagraph-capture-sizes",
        lambda c: c.compilation_config.cudagraph_capture_sizes or None,
        WHY,
        "leave it out",
    ),
    Unsupported(
        "--max-cudagraph-capture-size",
        lambda c: c.compilation_config.max_cudagraph_capture_size or None,
        WHY,
        "leave it out or set it to 0",
    ),
)


def asked_for(vllm_config: "VllmConfig") -> tuple[Unsupported, Any] | None:
    """The first option that asks for CUDA graphs, and its value, where there are any to ask for."""
    return first_set(ASKED, vllm_config) if _are_possible(vllm_config) else None


def switch_off(vllm_config: "VllmConfig") -> None:
    """Set the mode that vLLM would choose itself to "none", and say so."""
    from vllm.config import CUDAGraphMode

    compilation = vllm_config.compilation_config
    if _are_possible(vllm_config) and compilation.cudagraph_mode is None:
        compilation.cudagraph_mode = CUDAGraphMode.NONE
        logger.info("CUDA graphs are off: %s; torch.compile stays on", WHY)


def _are_possible(vllm_config: "VllmConfig") -> bool:
    from vllm.platforms import current_platform

    # --enforce-eager has switched them off, whatever else was given.
    return current_platform.is_cuda_alike() and not vllm_config.model_config.enforce_eager


def _mode(mode: Any) -> str | None:
    from vllm.config import CUDAGraphMode

    return None if mode in (None, CUDAGraphMode.NONE) else f"cudagraph_mode {mode.name}"
