# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU worker with VIA-SD's Model Runner V1; `cpu_worker.py` says why a name is replaced."""

from unittest.mock import patch

from vllm.v1.worker import cpu_worker
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from vllm_nvium.worker.cpu_worker import KeepsGenerators, allow_amx
from vllm_nvium.worker.via_sd_runner import ViaSDModelRunnerMixin


class ViaSDCPUModelRunner(ViaSDModelRunnerMixin, KeepsGenerators, CPUModelRunner):
    """`CPUModelRunner` with a slim tier between the drafter and the next step."""


class ViaSDCPUWorker(cpu_worker.CPUWorker):
    """Chosen through `worker_cls` when VIA-SD runs on CPU."""

    def init_device(self) -> None:
        allow_amx()
        with patch.object(cpu_worker, "CPUModelRunner", ViaSDCPUModelRunner):
            super().init_device()
