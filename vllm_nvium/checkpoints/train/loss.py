# SPDX-License-Identifier: Apache-2.0
"""The training loss of N-vium (arXiv:2605.13190, training) without ever holding a tensor of all
tokens by the whole vocabulary. Every term is a small function of plain tensors beside its formula.

Notation: N heads, `p_k` the hazard of exit k, `pi_k` its weight, `q_k` head k's distribution, `y`
the next token, V vocabulary, H hidden size, T tokens.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from vllm_nvium.checkpoints import IGNORED
from vllm_nvium.model_executor.models.parent import capped, logits_cap

if TYPE_CHECKING:
    from vllm_nvium.model_executor.models.nvium_reference import NviumForCausalLM, NviumOutput

# Rows at a time: their logits should stay in a cache, and yet be enough for a matrix product.
CHUNK = 128


def _target_log_probs(
    hidden: torch.Tensor, unembedding: torch.Tensor, targets: torch.Tensor, cap: float | None
) -> torch.Tensor:
    """`log softmax(z)[y]` of every row, with `z = u W^T`, or `z = c tanh(u W^T / c)` where the
    model caps its logits: `[T]` from `[T, H]`, `[V, H]` and `[T]`."""
    logits = capped(F.linear(hidden, unembedding), cap)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.log_softmax(logits, dim=-1, dtype=wide).gather(1, targets[:, None]).squeeze(1)


def head_target_log_probs(
    hidden: torch.Tensor,
    unembedding: torch.Tensor,
    targets: torch.Tensor,
    chunk: int = CHUNK,
    cap: float | None = None,
) -> torch.Tensor:
    """Log-probability that one head gives to the next token.

        log q(y) = u . W[y] - logsumexp_v u . W[v]

    Memory: `chunk * V` numbers at a time, in the forward and in the backward pass, which computes
    the logits again.

    Args:
        hidden: `[..., H]`, `u`, the head's inputs.
        unembedding: `[V, H]`, `W`.
        targets: `[...]` int64, `y`; a row with -100 gives 0 and no gradient.
        chunk: rows at a time.
        cap: `c` of a model whose logits are `c tanh(u . W[v] / c)`.

    Returns:
        `[...]` float32 (float64 for float64 inputs).
    """
    if not torch.is_autocast_enabled(hidden.device.type):
        unembedding = unembedding.to(hidden.dtype)
    flat = targets.reshape(-1)
    scored = (flat != IGNORED).nonzero().squeeze(1)
    rows, wanted = hidden.reshape(-1, hidden.shape[-1])[scored], flat[scored]
    # Nothing is drawn, so that no random state need be kept.
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    found = torch.cat(
        [
            again(_target_log_probs, u, unembedding, y, cap)
            for u, y in zip(rows.split(chunk), wanted.split(chunk), strict=True)
        ]
    )
    result = found.new_zeros(len(flat)).index_copy(0, scored, found)
    return result.view(targets.shape)


def unembedding_of(model: "NviumForCausalLM", head: int) -> torch.Tensor:
    """The `[V, H]` matrix of one head; 0..N-2 are the early exits, N-1 the final head."""
    kind = model.config.exit_head
    if head == len(model.exits) or kind == "final":
        return model.lm_head.weight
    if kind == "embeddings":
        return model.model.embed_tokens.weight
    return model.exits[head].lm_head.weight


def mixture_target_log_probs(
    model: "NviumForCausalLM", output: "NviumOutput", targets: torch.Tensor, chunk: int = CHUNK
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the next tokens under the mixture and under every head.

        log p_mix(y) = logsumexp_k ( log pi_k + log q_k(y) )

    Args:
        output: of `model(..., compute_logits=False)` over `[B, T]` tokens.
        targets: `[B, T]` int64, the next token of every position; -100 where there is none.

    Returns:
        `[B, T]` and `[B, T, N]`, at least float32; 0 where the target is -100.
    """
    assert output.head_hidden is not None and output.exit_log_weights is not None
    heads = torch.stack(
        [
            head_target_log_probs(
                output.head_hidden[..., k, :],
                unembedding_of(model, k),
                targets,
                chunk,
                logits_cap(model.config),
            )
            for k in range(output.head_hidden.shape[-2])
        ],
        dim=-1,
    )
    mixture = torch.logsumexp(output.exit_log_weights + heads, dim=-1)
    return mixture.masked_fill(targets == IGNORED, 0.0), heads


def dense_target_log_probs(
    model: Any, input_ids: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """`[B, T]` log-probabilities of the next tokens under a dense twin."""
    hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    cap = logits_cap(model.config)
    return head_target_log_probs(hidden, model.get_output_embeddings().weight, targets, cap=cap)


def next_tokens(labels: torch.Tensor) -> torch.Tensor:
    """`[B, T]` token ids -> `[B, T]` targets: the token that follows, -100 at the last position."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def warm_up_penalty(margins: torch.Tensor) -> torch.Tensor:
    """What pulls hazards towards equal exit weights in the first steps.

        mean_t sum_{k<N} (p_k - 1 / (N - k + 1))^2        (k from 1)

    With these targets every weight `pi_k` is `1 / N`.

    Args:
        margins: `[..., N-1]`, `e_k - c_k`.
    """
    exits = margins.shape[-1]
    targets = 1.0 / torch.arange(exits + 1, 1, -1, dtype=margins.dtype, device=margins.device)
    return (torch.sigmoid(margins) - targets).square().sum(dim=-1).mean()


def mean_of_scored(values: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean of `values` `[B, T, ...]` over positions whose target is not -100."""
    return values[targets != IGNORED].mean()
