# SPDX-License-Identifier: Apache-2.0
"""`vllm-nvium search-mask`."""

from vllm_nvium.checkpoints.mask_search import command
from vllm_nvium.checkpoints.mask_search.command import add_arguments, run

__all__ = ["add_arguments", "run"]
__doc__ = command.__doc__
