# SPDX-License-Identifier: Apache-2.0
"""What tensor-parallel ranks have to agree on to the last bit."""

from typing import TypeVar

import torch
from vllm.distributed.parallel_state import get_tp_group

T = TypeVar("T")


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


def told_by_first_rank(value: T) -> T:
    """What rank 0 has, on every rank; itself where there is one rank. For what is on the host, may
    depend on a clock or a rank's own random numbers, and decides which collectives run next.

    Args:
        value: anything that can be pickled. Ranks of one machine tell it through shared memory.
    """
    group = get_tp_group()
    if group.world_size == 1:
        return value
    told: T = group.broadcast_object(value if group.rank_in_group == 0 else None, src=0)
    return told


def number_of_ranks() -> int:
    """That share every layer."""
    size: int = get_tp_group().world_size
    return size


def is_first_rank() -> bool:
    """Whether the others go by what this rank says."""
    return bool(get_tp_group().rank_in_group == 0)
