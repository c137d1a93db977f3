# SPDX-License-Identifier: Apache-2.0
"""The law of an N-vium token as small functions of plain tensors: the chance of every exit, the
mixture of the heads, the expected depth. Each function stands beside its formula; all of them are
from arXiv:2605.13190, section 3 (model), and the compute penalty of its training loss.

Notation: N heads = N-1 early exits + the final head, V vocabulary, `(c_k, e_k)` the router's two
logits (continue, exit) at exit k, hazard `p_k = sigmoid(e_k - c_k)` = chance of leaving at exit k
for a token that got there.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def _at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """`x` in float32, or unchanged when it is float64 (so that tests can ask for more digits)."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def exit_log_weights(margins: torch.Tensor) -> torch.Tensor:
    """Log-probability of every exit: `log pi`.

        pi_k = p_k * prod_{j<k} (1 - p_j)   (k < N)        pi_N = prod_{j<N} (1 - p_j)

    Computed as sums of `logsigmoid`, so nothing underflows: a margin of -1e4 gives `log p = -1e4`
    (its exponential is exactly 0 in float32), margins of -inf and +inf give hazards of exactly 0
    and 1, and a weight of zero is `-inf`, never NaN.

    Args:
        margins: `[..., N-1]`, `e_k - c_k`, any float dtype, no NaN; N-1 may be 0.

    Returns:
        `[..., N]` float32 (float64 for float64 margins); `exp` of it sums to 1 over the last axis.
    """
    margins = _at_least_float32(margins)
    log_exit = F.logsigmoid(margins)  # [..., N-1] log p_k
    # log prod_{j<k} (1 - p_j), with the empty product first. Every term is <= 0, so a sum can reach
    # -inf but never becomes inf - inf.
    log_reached = F.pad(F.logsigmoid(-margins).cumsum(dim=-1), (1, 0))  # [..., N]
    return log_reached + F.pad(log_exit, (0, 1))  # the final head exits with probability 1


def mixture_log_probs(head_logits: torch.Tensor, log_weights: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the mixture of the heads.

        log p_mix(y) = logsumexp_k ( log pi_k + log softmax(head_logits_k)(y) )

    A head of weight zero (`log_weights = -inf`) takes no part whatever its logits hold, so it may
    be left uncomputed. Logits of -inf (masked tokens) stay -inf in the result.

    Args:
        head_logits: `[..., N, V]`, one row of logits per head, any float dtype.
        log_weights: `[..., N]`, `log pi` as `exit_log_weights` returns it.

    Returns:
        `[..., V]` float32 (float64 when either input is).
    """
    log_weights = _at_least_float32(log_weights).unsqueeze(-1)  # [..., N, 1]
    log_q = F.log_softmax(_at_least_float32(head_logits), dim=-1)  # [..., N, V]
    # masked_fill and not only the sum: an unused head may hold NaN, and NaN + -inf is NaN.
    terms = (log_q + log_weights).masked_fill(log_weights == -torch.inf, -torch.inf)
    return torch.logsumexp(terms, dim=-2)


def taking_part(log_weights: torch.Tensor) -> torch.Tensor:
    """Which heads the mixture of a row has to see: those of weight above zero. Where one head has a
    log-weight of exactly 0 the weights of the others are below the smallest float32.

    Args:
        log_weights: `[T, N]`.

    Returns:
        `[T, N]` bool.
    """
    has_all = log_weights == 0.0
    # A NaN is neither: it has to reach the result.
    return (log_weights != -torch.inf) & (~has_all.any(dim=-1, keepdim=True) | has_all)


class RunningMixture:
    """Logits of the mixture of the heads, one head at a time, so that no `[T, N, V]` is needed.

        logits(y) = log p_mix(y) + sum_k pi_k log sum_u exp(head_logits_k(u))

    `log p_mix` plus one number per row, which makes them the logits of a head that has all the
    weight, bit by bit. So what is not indifferent to such a number (a repetition penalty, raw
    logits) does to a model whose hazards are zero what it does to a dense one.

    Args:
        log_weights: `[T, N]` float32, `log pi` as `exit_log_weights` returns it.
        vocab_size: V.
    """

    def __init__(self, log_weights: torch.Tensor, vocab_size: int) -> None:
        self._log_weights = log_weights
        num_rows = len(log_weights)
        self._log_probs = log_weights.new_full((num_rows, vocab_size), -torch.inf)  # [T, V]
        self._constant = log_weights.new_zeros(num_rows)  # [T]

    def put(self, rows: torch.Tensor, logits: torch.Tensor) -> None:
        """Rows `[n]` int64 that one head speaks for, whatever their weights: its `logits [n, V]`,
        which is what `add` makes of a weight of one."""
        self._log_probs[rows] = _at_least_float32(logits)

    def add(self, head: int, rows: torch.Tensor, logits: torch.Tensor) -> None:
        """Adds `logits [n, V]` of a head at rows `[n]` int64 that it takes part in."""
        log_weight = self._log_weights[rows, head]  # [n]
        logits = _at_least_float32(logits)
        log_sum = torch.logsumexp(logits, dim=-1)  # [n]
        log_sum = log_sum.masked_fill(log_weight == 0.0, 0.0)
        self._constant[rows] += log_weight.exp() * log_sum
        terms = logits + (log_weight - log_sum).unsqueeze(-1)  # [n, V]
        self._log_probs[rows] = torch.logaddexp(self._log_probs[rows], terms)

    def logits(self) -> torch.Tensor:
        """`[T, V]` float32, of all heads that were added; -inf in a row that none was added to."""
        return self._log_probs.add_(self._constant.unsqueeze(-1))


def expected_depth(
    log_weights: torch.Tensor, exit_layers: Sequence[int], num_layers: int
) -> torch.Tensor:
    """Expected share of the layers that a token runs before it is sampled.

        E_c = sum_{k<N} pi_k l_k / L + pi_N

    The mean of this over tokens is the compute penalty of the training loss.

    Args:
        log_weights: `[..., N]`, `log pi`.
        exit_layers: `l_k`, layers already run at each early exit; N-1 of them.
        num_layers: L.

    Returns:
        `[...]` float32 (float64 for float64 weights), a fraction of full depth in (0, 1].

    Raises:
        ValueError: `log_weights` does not have one more column than `exit_layers` has entries.
    """
    if log_weights.shape[-1] != len(exit_layers) + 1:
        raise ValueError(
            f"log_weights has {log_weights.shape[-1]} columns, and {len(exit_layers)} exits need "
            f"{len(exit_layers) + 1}."
        )
    log_weights = _at_least_float32(log_weights)
    depths = log_weights.new_tensor([layer / num_layers for layer in exit_layers] + [1.0])  # [N]
    return (log_weights.exp() * depths).sum(dim=-1)
