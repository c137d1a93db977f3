# SPDX-License-Identifier: Apache-2.0
"""`vllm.v1.sample.rejection_sampler`: on CPU vLLM 0.32's own `expand_batch_to_tokens` writes into a
copy, so that temperature, top-k and top-p of drafts are whatever was in memory. While VIA-SD's
sampler runs there, the name is a function that works; it can go when vLLM's does.
"""

from contextlib import AbstractContextManager
from unittest.mock import patch

import torch
from vllm.v1.sample import rejection_sampler


def expand_batch_to_tokens(
    x: torch.Tensor,
    cu_num_tokens: torch.Tensor,
    num_tokens: int,
    replace_from: int = 0,
    replace_to: int = 0,
) -> torch.Tensor:
    """What vLLM's function of this name is for: `x` [B] of each request for each of its drafts."""
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1)).long()
    x = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
    return x.repeat_interleave(counts, output_size=num_tokens)


def works_on_cpu() -> AbstractContextManager[object]:
    """While a rejection sampler runs on CPU."""
    name = expand_batch_to_tokens.__name__
    return patch.object(rejection_sampler, name, expand_batch_to_tokens)
