# SPDX-License-Identifier: Apache-2.0
"""The router of one exit: how much evidence a token has for leaving there.

It has no attention and no KV: an MLP on the normed residual stream of one token, and two logits,
(continue, exit), whose difference is the logit of the hazard (arXiv:2605.13190).
"""

import torch
from torch import nn
from torch.nn import functional as F
from vllm.model_executor.layers.linear import ReplicatedLinear

from vllm_nvium.model_executor.layers.layernorm import FusedRMSNorm


class RouterBlock(nn.Module):
    """`fc2(GELU(fc1(x)))` with biases and the exact (erf) GELU."""

    def __init__(self, size_in: int, intermediate: int, size_out: int, prefix: str) -> None:
        super().__init__()
        self.fc1 = ReplicatedLinear(
            size_in, intermediate, bias=True, return_bias=False, prefix=f"{prefix}.fc1"
        )
        self.fc2 = ReplicatedLinear(
            intermediate, size_out, bias=True, return_bias=False, prefix=f"{prefix}.fc2"
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class RouterHead(nn.Module):
    """The last linear map, kept as the difference of its two rows: only `e - c` is ever needed."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, size), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(2), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, R] -> margins [T] float32, computed in float32 so that hazards are not rounded."""
        weight = (self.weight[1].float() - self.weight[0].float()).unsqueeze(1)
        return (x.float() @ weight).squeeze(1) + (self.bias[1].float() - self.bias[0].float())


class Router(nn.Module):
    """Margins `e_k - c_k = logit(p_k)` of tokens at one exit.

    `constant_margin` is set while weights are loaded, when the head's weight is all zeros: the
    hazard is then the same for every token and the body need not be evaluated.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        router_hidden_size: int,
        num_blocks: int,
        eps: float,
        prefix: str,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            RouterBlock(
                hidden_size if j == 0 else router_hidden_size,
                intermediate_size,
                router_hidden_size,
                f"{prefix}.blocks.{j}",
            )
            for j in range(num_blocks)
        )
        self.norm = FusedRMSNorm(router_hidden_size, eps=eps)
        self.head = RouterHead(router_hidden_size)
        self.constant_margin: float | None = None

    def forward(self, normed: torch.Tensor) -> torch.Tensor:
        """Normed states [T, H] -> margins [T] float32."""
        x = normed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
