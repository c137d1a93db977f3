# SPDX-License-Identifier: Apache-2.0
"""`vllm.v1.worker.cpu_worker`: `CPUWorker.init_device` makes its model runner by a name of its
module, and while it runs for an engine of this package, that name is another class. The GPU worker
has a method to override instead; this can go when the CPU worker has one, too.
"""

from contextlib import AbstractContextManager
from unittest.mock import patch

from vllm.v1.worker import cpu_worker


def model_runner_is(runner: type) -> AbstractContextManager[object]:
    """While a CPU worker makes its model runner: it makes this one."""
    return patch.object(cpu_worker, "CPUModelRunner", runner)
