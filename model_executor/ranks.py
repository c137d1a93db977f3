# SPDX-License-Identifier: Apache-2.0
"""What tensor-parallel ranks have to agree on to the last bit."""

import torch
from vllm.distributed.parallel_state import get_tp_group


def of_first_rank(values: torch.Tensor) -> torch.Tensor:
    """The values of rank 0, on every rank; itself where there is one rank.

    Every rank decides on its own host who leaves, and with that which layers and collectives run
    next: ranks that decide differently wait for each other without end. Routers are replicated, so
    their results differ only if their inputs do, but nothing says that an all-reduce returns the
    same last bit everywhere, or that unlike processors round alike. The price is one broadcast per
    exit, of a float a request, beside two all-reduces of whole states in every layer.
    """
    group = get_tp_group()
    if group.world_size == 1:
        return values
    return group.broadcast(values.contiguous(), src=0)
