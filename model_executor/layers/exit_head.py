# SPDX-License-Identifier: Apache-2.0
"""What turns the residual stream at an exit into the input of the unembedding.

The head of an exit is `u_k = n_k + A_k2 SiLU(A_k1 n_k)` with `n_k = RMSNorm_k(h_k)`
(arXiv:2605.13190); the final head is the same adapter on the model's own final norm.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from vllm_nvium.model_executor.layers.layernorm import FusedRMSNorm
from vllm_nvium.model_executor.layers.router import Router
from vllm_nvium.model_executor.ranks import of_first_rank

if TYPE_CHECKING:
    from vllm_nvium.model_executor.models.configuration_nvium import NviumConfig


class Adapter(nn.Module):
    """`u = n + A_2 SiLU(A_1 n)`, without biases; starts as the identity because A_2 starts at zero.

    `is_identity` is set while weights are loaded: an A_2 of zeros adds exactly nothing, so its two
    products are skipped.
    """

    def __init__(self, hidden_size: int, adapter_size: int, prefix: str) -> None:
        super().__init__()
        self.fc1 = ReplicatedLinear(
            hidden_size, adapter_size, bias=False, return_bias=False, prefix=f"{prefix}.fc1"
        )
        self.fc2 = ReplicatedLinear(
            adapter_size, hidden_size, bias=False, return_bias=False, prefix=f"{prefix}.fc2"
        )
        self.is_identity = False

    def forward(self, normed: torch.Tensor) -> torch.Tensor:
        """[T, H] -> [T, H] in the model's dtype."""
        if self.is_identity:
            return normed
        return normed + self.fc2(F.silu(self.fc1(normed)))


class Exit(nn.Module):
    """One early exit: its norm and adapter, and the router that says who leaves.

    The unembedding is shared and lives in the model, unless the checkpoint gives every exit its
    own (`lm_head`).
    """

    def __init__(self, config: "NviumConfig", prefix: str) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        inner, size = config.router_intermediate_size, config.router_hidden_size
        assert inner is not None and size is not None  # the configuration fills them in
        self.norm = FusedRMSNorm(hidden, eps=eps)
        self.adapter = (
            Adapter(hidden, config.exit_adapter_size, f"{prefix}.adapter")
            if config.exit_adapter_size
            else None
        )
        self.router = Router(
            hidden,
            inner,
            size,
            config.router_num_blocks,
            eps,
            f"{prefix}.router",
        )
        self.lm_head = (
            ParallelLMHead(config.vocab_size, hidden, prefix=f"{prefix}.lm_head")
            if config.exit_head == "own"
            else None
        )

    def head_input(self, normed: torch.Tensor) -> torch.Tensor:
        """Normed states [T, H] -> inputs of the unembedding [T, H]."""
        return normed if self.adapter is None else self.adapter(normed)

    def margins(self, normed: torch.Tensor) -> torch.Tensor:
        """Normed states [T, H] -> `e_k - c_k`, the logits of the hazards, [T] float32, the same on
        all tensor-parallel ranks."""
        constant = self.router.constant_margin
        if constant is None:
            return of_first_rank(self.router(normed))
        return torch.full((len(normed),), constant, dtype=torch.float32, device=normed.device)
