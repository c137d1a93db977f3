# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU worker with N-vium's Model Runner V1."""

from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from vllm_nvium.engine.cpu_worker import CPUWorkerWithRunner, KeepsGenerators
from vllm_nvium.nvium.runner_v1 import NviumModelRunnerMixin


class NviumCPUModelRunner(NviumModelRunnerMixin, KeepsGenerators, CPUModelRunner):
    """`CPUModelRunner` that hands the model its `Step`."""


class NviumCPUWorker(CPUWorkerWithRunner):
    """Chosen through `worker_cls` when an N-vium model runs on CPU."""

    runner = NviumCPUModelRunner
