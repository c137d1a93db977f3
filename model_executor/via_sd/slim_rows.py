# SPDX-License-Identifier: Apache-2.0
"""What goes into a slim pass over some windows and what is made of its logits: their rows in the
target's own paged KV cache, and the slim law of each row (arXiv:2606.12243, section 3).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

from vllm_nvium.model_executor.ops.ragged import ragged_ranges, slots_of
from vllm_nvium.model_executor.rows import Rows
from vllm_nvium.model_executor.via_sd.step import Window


def rows_of_windows(
    windows: Sequence[Window],
    drafted: Sequence[int],
    block_tables: Sequence[Any],
    num_requests: int,
    device: torch.device,
) -> list[Rows]:
    """Rows [last token, drafts] of each window, for every KV cache group.

    Args:
        drafted: drafts of each window.
        block_tables: vLLM's table of each group; num_requests: rows in use in them.
    """
    first = np.array([window.last_position for window in windows], dtype=np.int64)
    last = first + np.array(drafted, dtype=np.int64)
    sequence, positions, query_start = ragged_ranges(first, last)
    batch_rows = np.array([window.request for window in windows])
    device_rows = torch.from_numpy(batch_rows).to(device)
    device_positions = torch.from_numpy(positions).to(device)
    groups = []
    for table in block_tables:
        blocks = table.get_numpy_array()[:num_requests][batch_rows]
        slots = slots_of(blocks, sequence, positions, table.block_size)
        groups.append(
            Rows(
                first=first,
                last=last,
                query_start=query_start,
                slots=slots,
                slots_device=torch.from_numpy(slots).to(device),
                positions=device_positions,
                block_table=table.get_device_tensor(num_requests)[device_rows],
            )
        )
    return groups


def slim_laws(
    logits: torch.Tensor,
    windows: Sequence[Window],
    counts: torch.Tensor,
    temperature: torch.Tensor | None,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
) -> torch.Tensor:
    """The slim law of every row under its request's temperature, top-k and top-p.

    At temperature 0 a point mass, or in the paper's mode the law at temperature 1, because its
    thresholds need one.

    Args:
        logits: [T, V], rows [last token, drafts] of each window in turn; counts: [B] int64, drafts
            of each window.
        temperature, top_k, top_p: [B], of the windows' requests; None where all go without.

    Returns:
        [T, V] float32.
    """
    per_row = (counts + 1).to(logits.device)
    is_greedy = torch.tensor([window.is_greedy for window in windows], device=logits.device)
    ones = torch.ones(len(windows), device=logits.device)
    temperature = ones if temperature is None else torch.where(is_greedy, ones, temperature)
    scaled = logits.float() / temperature.repeat_interleave(per_row)[:, None]
    k, p = (None if found is None else found.repeat_interleave(per_row) for found in (top_k, top_p))
    laws = apply_top_k_top_p(scaled, k, p).softmax(dim=-1)
    point = torch.tensor([window.is_greedy and not window.is_paper for window in windows])
    rows = point.to(logits.device).repeat_interleave(per_row).nonzero().squeeze(1)
    if len(rows):
        top = logits[rows].argmax(dim=-1)
        laws[rows] = 0.0
        laws[rows, top] = 1.0
    return laws
