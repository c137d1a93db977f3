# SPDX-License-Identifier: Apache-2.0
"""vLLM's GPU worker with VIA-SD's Model Runner V1; start-up has made sure that it is V1."""

from typing import Any

from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from vllm_nvium.via_sd.runner_v1 import ViaSDModelRunnerMixin


class ViaSDGPUModelRunner(ViaSDModelRunnerMixin, GPUModelRunner):
    """`GPUModelRunner` with a slim tier between the drafter and the next step."""


class ViaSDGPUWorker(Worker):
    """Chosen through `worker_cls` when VIA-SD runs on a GPU."""

    def _make_model_runner(self) -> Any:
        return ViaSDGPUModelRunner(self.vllm_config, self.device)
