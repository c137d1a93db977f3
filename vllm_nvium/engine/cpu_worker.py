# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU worker with another Model Runner V1, and what both methods need on CPU."""

from typing import Any, ClassVar

import numpy as np
import torch
from vllm.v1.worker import cpu_worker

from vllm_nvium.engine.patches.cpu_worker import model_runner_is


class KeepsGenerators:
    """Put before `CPUModelRunner`: seeded requests whose prompt is computed in chunks."""

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """Samples with the generators of unfinished prompts put aside.

        vLLM draws for them too, discards the draw, and then rewinds the generator by an offset that
        generators on CPU do not have: without this a seeded request whose prompt is computed in
        chunks stops the engine. It can go when vLLM's CPU runner no longer rewinds.
        """
        batch: Any = self.input_batch  # type: ignore[attr-defined]
        generators = batch.generators
        discard = self.discard_request_mask.np  # type: ignore[attr-defined]
        discarded = np.flatnonzero(discard[: batch.num_reqs])
        aside = {i: generators.pop(i) for i in map(int, discarded) if i in generators}
        try:
            return super().sample_tokens(*args, **kwargs)  # type: ignore[misc]
        finally:
            generators.update(aside)


def allow_amx() -> None:
    """Asks the kernel for this process's AMX tiles, which a process may not use unasked.

    vLLM 0.32's bfloat16 attention on CPUs with AMX uses them and does not ask: a model whose
    matrices are so small that oneDNN did not ask before dies of an illegal instruction.
    """
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()


class CPUWorkerWithRunner(cpu_worker.CPUWorker):
    """`CPUWorker` whose model runner is `runner`; each method has a class of its own, because
    `worker_cls` names one."""

    runner: ClassVar[type]

    def init_device(self) -> None:
        allow_amx()
        with model_runner_is(self.runner):
            super().init_device()
