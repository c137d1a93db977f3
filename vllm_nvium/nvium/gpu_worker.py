# SPDX-License-Identifier: Apache-2.0
"""vLLM's GPU worker with N-vium's Model Runner V1, for GPUs that do not use Model Runner V2.

The GPU worker has a method that makes its runner; only that is overridden.
"""

from typing import Any

from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from vllm_nvium.nvium.runner_v1 import NviumModelRunnerMixin


class NviumGPUModelRunner(NviumModelRunnerMixin, GPUModelRunner):
    """`GPUModelRunner` that hands the model its `Step`."""


class NviumGPUWorker(Worker):
    """Chosen through `worker_cls` when an N-vium model runs on Model Runner V1 on a GPU."""

    def _make_model_runner(self) -> Any:
        if self.use_v2_model_runner:
            return super()._make_model_runner()
        return NviumGPUModelRunner(self.vllm_config, self.device)
