# SPDX-License-Identifier: Apache-2.0
"""What vLLM calls at start in every process. It adds the N-vium architecture to vLLM's registry."""


def register() -> None:
    from vllm.model_executor.models import ModelRegistry

    ModelRegistry.register_model(
        "NviumForCausalLM", "vllm_nvium.model_executor.models.nvium:NviumForCausalLM"
    )
