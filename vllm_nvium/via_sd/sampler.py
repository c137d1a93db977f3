# SPDX-License-Identifier: Apache-2.0
"""vLLM's rejection sampler for windows: tokens that the paper's rule of VIA-SD keeps pass through
it unasked (arXiv:2606.12243, section 3), and on CPU it is given a function that works.
"""

from typing import Any

import torch
from vllm.v1.sample.rejection_sampler import RejectionSampler

from vllm_nvium.engine.patches.rejection_sampler import works_on_cpu


class TieredRejectionSampler(RejectionSampler):
    """vLLM's rejection sampler; tokens that the paper's rule keeps unasked pass through it."""

    # [tokens] bool, of the drafts of the present step; None when all are asked about.
    kept: torch.Tensor | None = None

    def forward(
        self, metadata: Any, draft_probs: Any, logits: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if logits.device.type != "cpu":
            return super().forward(metadata, draft_probs, logits, *args, **kwargs)
        with works_on_cpu():
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
