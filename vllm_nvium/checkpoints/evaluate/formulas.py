# SPDX-License-Identifier: Apache-2.0
"""The formulas of an evaluation, each a small function of plain tensors: which head speaks at
temperature 0, what share of the tokens leaves at each exit, how many bytes of weights that reads,
and how far apart two perplexities are.

Notation: N heads = N-1 early exits + the final head, `l_k` layers run at exit k of L in all, `p_k`
its hazard, `pi_k` its weight, V vocabulary, H hidden size. Losses are in nats per token.
"""

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from vllm_nvium.checkpoints.train.loss import CHUNK
from vllm_nvium.model_executor.models.checkpoint_layout import expected_shapes
from vllm_nvium.model_executor.nvium.policy import first_exit, leaves

if TYPE_CHECKING:
    from vllm_nvium.model_executor.models.configuration_nvium import NviumConfig

# In the names of tensors: one of a layer's experts.
EXPERT = re.compile(r"\.experts\.(\d+)\.")


def greedy_exits(margins: torch.Tensor, greedy_margin: float) -> torch.Tensor:
    """The head that speaks for each token at temperature 0: the first exit that is sure enough.

        exit(t) = min { k : e_k - c_k > greedy_margin }, else N

    Args:
        margins: `[..., N-1]`, `e_k - c_k`.
        greedy_margin: of the model's configuration; 0 is `p_k > 1/2`.

    Returns:
        `[...]` int64 in 0 .. N-1, N-1 for the final head.
    """
    return first_exit(leaves(margins, greedy_margin))


def greedy_shares(margins: torch.Tensor, greedy_margin: float) -> torch.Tensor:
    """Share of the tokens that the greedy rule sends to each head.

        share_k = mean_t 1[greedy exit of t is k]

    Args:
        margins: `[..., T, N-1]`.
        greedy_margin: see `greedy_exits`.

    Returns:
        `[..., N]` float64, summing to 1.
    """
    exits = greedy_exits(margins, greedy_margin)
    return F.one_hot(exits, margins.shape[-1] + 1).double().mean(dim=-2)


def sampled_shares(log_weights: torch.Tensor) -> torch.Tensor:
    """Expected share of the tokens that leave at each head when exits are drawn (temperature 1).

        share_k = mean_t pi_k(t)

    Args:
        log_weights: `[..., T, N]`, `log pi`.

    Returns:
        `[..., N]` float64, summing to 1.
    """
    return log_weights.double().exp().mean(dim=-2)


def exit_bytes(
    config: "NviumConfig",
    constant_routers: Sequence[bool],
    identity_adapters: Sequence[bool],
    itemsize: int = 2,
) -> list[int]:
    """Bytes of weights read for one token that leaves at each head, at batch 1.

        bytes_k = sum_{i <= l_k} |layer_i| + sum_{j <= k} (|norm_j| + |router_j|) + |adapter_k|
                  + |W_out|                                                                  (k < N)
        bytes_N = sum_i |layer_i| + sum_{j < N} (|norm_j| + |router_j|) + |norm| + |adapter_N|
                  + |W_out|

    Of a layer's experts, those are counted that one token is sent to. Catching up with positions
    that left early reads nothing more (but their experts, which are not counted): they ride along
    in passes that read those weights anyway.

    Args:
        constant_routers: `[N-1]`, exits whose hazard is the same for every token; such a router is
            not evaluated and counts nothing.
        identity_adapters: `[N]`, the final head's last; an identity is skipped and counts nothing.
        itemsize: bytes per weight.

    Returns:
        N numbers.
    """
    sizes = _weight_sizes(config)

    def adapter(name: str, is_identity: bool) -> int:
        return 0 if is_identity else _total(sizes, f"{name}.")

    unembedding = config.vocab_size * config.hidden_size
    layers = [_total(sizes, f"model.layers.{i}.") for i in range(config.num_hidden_layers)]
    read, result = 0, []
    for k, layer in enumerate(config.exit_layers):
        read += _total(sizes, f"exits.{k}.norm.")
        read += 0 if constant_routers[k] else _total(sizes, f"exits.{k}.router.")
        leaving = adapter(f"exits.{k}.adapter", identity_adapters[k])
        result.append(sum(layers[:layer]) + read + leaving + unembedding)
    leaving = adapter("final_adapter", identity_adapters[-1])
    result.append(sum(layers) + read + sizes["model.norm.weight"] + leaving + unembedding)
    return [itemsize * size for size in result]


def backbone_bytes(config: "NviumConfig", itemsize: int = 2) -> int:
    """Bytes of weights that a dense model of this backbone reads per token.

    sum_i |layer_i| + |norm| + |W_out|
    """
    sizes = _weight_sizes(config)
    layers = _total(sizes, "model.layers.") + sizes["model.norm.weight"]
    return itemsize * (layers + config.vocab_size * config.hidden_size)


def expected_bytes(shares: torch.Tensor, bytes_per_exit: Sequence[int]) -> float:
    """Mean bytes of weights read per token: `sum_k share_k bytes_k`.

    Args:
        shares: `[N]`.
        bytes_per_exit: N numbers, of `exit_bytes`.
    """
    return float((shares.double() * shares.new_tensor(bytes_per_exit, dtype=torch.float64)).sum())


def paired_log_ratio(
    losses: Sequence[float], reference: Sequence[float]
) -> tuple[float, float | None]:
    """Log of the ratio of two perplexities on the same blocks, and its standard error.

        d_b = loss_b - reference_b      log ratio = mean_b d_b      error = std_b(d_b) / sqrt(B)

    The error is that of the difference, block by block: what makes a block hard for both models
    drops out. `std` divides by B - 1.

    Args:
        losses, reference: mean loss of each of the B blocks, nats per token.

    Returns:
        Log ratio and error; the error is `None` with a single block.
    """
    differences = [loss - other for loss, other in zip(losses, reference, strict=True)]
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return mean, None
    return mean, statistics.stdev(differences) / math.sqrt(len(differences))


def perplexity(loss: float) -> float:
    """`exp(loss)`, infinite where that is more than a float holds."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def top_tokens(hidden: torch.Tensor, unembedding: torch.Tensor, chunk: int = CHUNK) -> torch.Tensor:
    """The most likely next token of one head, `argmax_v u . W[v]`, `chunk` rows at a time.

    Args:
        hidden: `[..., H]`, `u`.
        unembedding: `[V, H]`, `W`.

    Returns:
        `[...]` int64.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    weight = unembedding.to(hidden.dtype)
    found = [F.linear(some, weight).argmax(dim=-1) for some in rows.split(chunk)]
    return torch.cat(found).view(hidden.shape[:-1])


def _weight_sizes(config: "NviumConfig") -> dict[str, int]:
    """Number of weights in every tensor of a checkpoint, without the experts of a layer that a
    token is not sent to (all have one shape). Counted from the configuration, because the modules
    of a model in training may be wrapped, or hold more than will be saved."""
    experts = getattr(config.parent, "num_experts_per_tok", 0)
    return {
        name: math.prod(shape)
        for name, shape in expected_shapes(config).items()
        if not (number := EXPERT.search(name)) or int(number[1]) < experts
    }


def _total(sizes: Mapping[str, int], prefix: str) -> int:
    return sum(size for name, size in sizes.items() if name.startswith(prefix))
