# SPDX-License-Identifier: Apache-2.0
"""What the random numbers of an engine begin with: `--seed`, and which of several data-parallel
engines it is."""

from typing import TYPE_CHECKING

from vllm_nvium.model_executor.ops.draws import request_seed

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def engine_seed(vllm_config: "VllmConfig") -> int:
    """vLLM's `--seed`, told apart for data-parallel engines: they share it, and offline each of
    them numbers its requests from 0. vLLM mixes the index into its own seed for the same reason.
    """
    seed = vllm_config.model_config.seed
    index = vllm_config.parallel_config.data_parallel_index
    return request_seed(None, f"engine {index}", seed) if index else seed
