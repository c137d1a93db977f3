# SPDX-License-Identifier: Apache-2.0
"""The class that vLLM loads: the model of `model_executor`, and the seam of Model Runner V2."""

from vllm_nvium.model_executor.models import nvium


class NviumForCausalLM(nvium.NviumForCausalLM):
    """An N-vium model as vLLM serves it."""

    @classmethod
    def get_model_state_cls(cls) -> type:
        """What Model Runner V2 asks a model for."""
        from vllm_nvium.nvium.runner_v2 import NviumModelState

        return NviumModelState
