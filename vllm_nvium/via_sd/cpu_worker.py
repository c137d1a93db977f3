# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU worker with VIA-SD's Model Runner V1."""

from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from vllm_nvium.engine.cpu_worker import CPUWorkerWithRunner, KeepsGenerators
from vllm_nvium.via_sd.runner_v1 import ViaSDModelRunnerMixin


class ViaSDCPUModelRunner(ViaSDModelRunnerMixin, KeepsGenerators, CPUModelRunner):
    """`CPUModelRunner` with a slim tier between the drafter and the next step."""


class ViaSDCPUWorker(CPUWorkerWithRunner):
    """Chosen through `worker_cls` when VIA-SD runs on CPU."""

    runner = ViaSDCPUModelRunner
