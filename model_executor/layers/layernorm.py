# SPDX-License-Identifier: Apache-2.0
"""The norm of exits and routers. It is vLLM's, called as one kernel: exits run on one row between
compiled segments, where the calls cost more than the arithmetic.
"""

import torch
from vllm.model_executor.layers.layernorm import RMSNorm


class FusedRMSNorm(RMSNorm):
    """vLLM's RMSNorm as one kernel call.

    Exits run between compiled segments, where nothing fuses the eight small operations that vLLM's
    own dispatch uses on CPU and under compilation.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, H] -> [T, H] in the dtype of `x`."""
        normed = torch.empty_like(x)
        torch.ops._C.rms_norm(normed, x, self.weight, self.variance_epsilon)
        return normed
