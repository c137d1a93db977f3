# SPDX-License-Identifier: Apache-2.0
"""What goes into a slim pass over some windows: their rows in the target's own paged KV cache
(arXiv:2606.12243, section 3). What is made of its logits is the sampler's business.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

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
