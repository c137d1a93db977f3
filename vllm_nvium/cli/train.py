# SPDX-License-Identifier: Apache-2.0
"""`vllm-nvium train`."""

from vllm_nvium.checkpoints.train import command
from vllm_nvium.checkpoints.train.command import add_arguments, run

__all__ = ["add_arguments", "run"]
__doc__ = command.__doc__
