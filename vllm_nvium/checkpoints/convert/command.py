# SPDX-License-Identifier: Apache-2.0
"""The names that training still imports from here."""

from vllm_nvium.checkpoints.convert import convert, open_source
from vllm_nvium.console import comma_separated

__all__ = ["comma_separated", "convert", "open_source"]
