# SPDX-License-Identifier: Apache-2.0
"""vLLM's rejection sampler for windows: tokens that the paper's rule of VIA-SD keeps pass through
it unasked (arXiv:2606.12243, section 3), and on CPU it is given a function that works.
"""

from typing import Any
from unittest.mock import patch

import torch
from vllm.v1.sample import rejection_sampler as vllm_rejection_sampler
from vllm.v1.sample.rejection_sampler import RejectionSampler


def expand_batch_to_tokens(
    x: torch.Tensor,
    cu_num_tokens: torch.Tensor,
    num_tokens: int,
    replace_from: int = 0,
    replace_to: int = 0,
) -> torch.Tensor:
    """What vLLM's function of this name is for: `x` [B] of each request for each of its drafts.

    On CPU vLLM 0.32's own kernel writes into a copy: temperature, top-k and top-p of drafts would
    be whatever was in memory.
    """
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1)).long()
    x = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
    return x.repeat_interleave(counts, output_size=num_tokens)


class TieredRejectionSampler(RejectionSampler):
    """vLLM's rejection sampler; tokens that the paper's rule keeps unasked pass through it."""

    # [tokens] bool, of the drafts of the present step; None when all are asked about.
    kept: torch.Tensor | None = None

    def forward(
        self, metadata: Any, draft_probs: Any, logits: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if logits.device.type != "cpu":
            return super().forward(metadata, draft_probs, logits, *args, **kwargs)
        name = expand_batch_to_tokens.__name__
        with patch.object(vllm_rejection_sampler, name, expand_batch_to_tokens):
            return super().forward(metadata, draft_probs, logits, *args, **kwargs)

    def apply_logits_processors(
        self, logits: torch.Tensor, sampling_metadata: Any, metadata: Any
    ) -> torch.Tensor:
        logits = super().apply_logits_processors(logits, sampling_metadata, metadata)
        if self.kept is not None:
            tokens = metadata.draft_token_ids.long()
            # All weight on the draft. Log-probabilities are the full model's all the same: vLLM
            # takes them before (`raw_logprobs`, its default).
            rows = self.kept.nonzero().squeeze(1)
            # What a request forbids stays forbidden.
            rows = rows[logits[rows, tokens[rows]] > -torch.inf]
            logits[rows] = -torch.inf
            logits[rows, tokens[rows]] = 0.0
        return logits
