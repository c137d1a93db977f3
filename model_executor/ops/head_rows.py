# SPDX-License-Identifier: Apache-2.0
"""Rows that carry more than one head from the model's forward to its `compute_logits`.

vLLM only indexes the rows that `forward` returns, so a row may be wider than the hidden size. A
step in which some row needs the mixture itself returns such rows: the inputs of all N heads, the
log-weights of the exits, and what is already decided. A step that needs none returns plain [T, H].
"""

import numpy as np
import torch

from vllm_nvium.model_executor.ops.mixture import taking_part

NO_TOKEN = -1
MIXTURE = -1


class HeadRows:
    """A [T, W] tensor in the model's dtype: N head inputs, N float32 weights, 2 int32 fields.

    The 32-bit fields are stored bit by bit in columns of the model's dtype, which copying and
    indexing leave alone.

    Args:
        num_rows: T.
        num_heads: N, early exits and the final head.
        hidden_size: H.
        like: a tensor whose dtype and device the rows take.
    """

    def __init__(self, num_rows: int, num_heads: int, hidden_size: int, like: torch.Tensor) -> None:
        width = row_width(num_heads, hidden_size, like.dtype)
        self.packed = torch.zeros(num_rows, width, dtype=like.dtype, device=like.device)
        self.heads, self.log_weights, self.fields = _views(self.packed, num_heads, hidden_size)
        self.fields.fill_(NO_TOKEN)
        self.log_weights.fill_(-torch.inf)


def row_width(num_heads: int, hidden_size: int, dtype: torch.dtype) -> int:
    """Columns of a packed row; never the hidden size itself, so the two kinds cannot be confused.

    The 32-bit fields come first, so that they stay aligned whatever the hidden size is.
    """
    per_word = 4 // dtype.itemsize
    width = (num_heads + 2) * per_word + num_heads * hidden_size
    return width + width % per_word


def _views(
    packed: torch.Tensor, num_heads: int, hidden_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    first = _columns_of_words(num_heads, packed.dtype)
    heads = packed[:, first : first + num_heads * hidden_size]
    return heads.unflatten(1, (num_heads, hidden_size)), *_words(packed, num_heads)


def _columns_of_words(num_heads: int, dtype: torch.dtype) -> int:
    return (num_heads + 2) * (4 // dtype.itemsize)


def _words(packed: torch.Tensor, num_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    log_weights = packed.view(torch.float32)[:, :num_heads]
    return log_weights, packed.view(torch.int32)[:, num_heads : num_heads + 2]


def unpack(
    packed: torch.Tensor, num_heads: int, hidden_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Takes packed rows apart.

    Returns:
        heads: [T, N, H] model dtype; log_weights: [T, N] float32;
        single: [T] int32, the one head that speaks for the row, or `MIXTURE`;
        token: [T] int32, a token already decided, or `NO_TOKEN`.
    """
    heads, log_weights, fields = _views(packed.contiguous(), num_heads, hidden_size)
    return heads, log_weights, fields[:, 0], fields[:, 1]


def unpack_on_host(
    packed: torch.Tensor, num_heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `unpack` returns beside the heads, on the host, by one copy."""
    columns = _columns_of_words(num_heads, packed.dtype)
    log_weights, fields = _words(packed[:, :columns].contiguous().cpu(), num_heads)
    return log_weights, fields[:, 0], fields[:, 1]


def speakers(
    log_weights: torch.Tensor, single: torch.Tensor, token: torch.Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which heads the logits of the rows need: all pairs of a row and a head that speaks for it. A
    row of a decided token needs none.

    Args:
        log_weights, single, token: on the host, see `unpack`.

    Returns:
        rows, heads: [P] int64, ascending by head and then by row;
        alone: [P] bool, the head speaks for the row alone and is not one of a mixture.
    """
    is_open = token == NO_TOKEN
    is_alone = is_open & (single != MIXTURE)
    speaks = taking_part(log_weights) & (is_open & ~is_alone)[:, None]  # [T, N]
    speaks[is_alone, single[is_alone].long()] = True
    heads, rows = np.nonzero(speaks.numpy().T)
    return rows, heads, is_alone.numpy()[rows]
