# SPDX-License-Identifier: Apache-2.0
"""How vLLM's own drafters go on inside a window: after a slim check they are called again as if it
had been a step of the target. A drafter that is not known here answers once per window.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch

from vllm_nvium.model_executor.ops.ragged import ragged_ranges
from vllm_nvium.model_executor.rows import Rows, common_attention_metadata
from vllm_nvium.model_executor.via_sd.step import Drafts, Window


class DraftAgain(Protocol):
    """Calls a drafter from the ends of windows.

    Args of a call:
        windows: of the slim pass that was just checked; going: which of them go on.
        hidden: [T, H] of that pass; rows: its rows, per KV cache group.
        count: drafts wanted of each.
    """

    def __call__(
        self,
        windows: Sequence[Window],
        going: Sequence[int],
        hidden: torch.Tensor,
        rows: Sequence[Rows],
        count: int,
    ) -> Drafts: ...


def drafts_again(runner: Any) -> DraftAgain | None:
    """How the runner's drafter goes on in a window; None when it cannot.

    Suffix decoding learns from every token that it is shown and cannot unlearn one that the full
    model rejects; drafters that read the target's hidden states (EAGLE, MTP, Medusa) would be given
    the slim verifier's, which they were not trained on.
    """
    config = runner.speculative_config
    if config.method == "ngram":
        return _NgramAgain(runner)
    if config.uses_draft_model() and not config.parallel_drafting:
        return _DraftModelAgain(runner)
    return None


class _NgramAgain:
    """N-gram lookup reads the tokens of all requests from the batch's own array."""

    def __init__(self, runner: Any) -> None:
        self.runner = runner

    def __call__(
        self,
        windows: Sequence[Window],
        going: Sequence[int],
        hidden: torch.Tensor,
        rows: Sequence[Rows],
        count: int,
    ) -> Drafts:
        batch = self.runner.input_batch
        lengths = batch.num_tokens_no_spec.copy()
        asked: list[list[int]] = [[] for _ in range(batch.num_reqs)]
        for i in going:
            window = windows[i]
            start = window.position + 1
            # Behind the last token of a request the array is scratch space for drafts.
            batch.token_ids_cpu[window.request, start : start + len(window.tokens)] = window.tokens
            lengths[window.request] = start + len(window.tokens)
            asked[window.request] = [window.last_token]
        found = self.runner.drafter.propose(count, asked, lengths, batch.token_ids_cpu)
        return Drafts([list(found[windows[i].request]) for i in going])


class _DraftModelAgain:
    """A draft model runs over what the slim check kept, which completes its own KV cache, and
    drafts behind the slim tier's token."""

    def __init__(self, runner: Any) -> None:
        self.runner = runner

    def __call__(
        self,
        windows: Sequence[Window],
        going: Sequence[int],
        hidden: torch.Tensor,
        rows: Sequence[Rows],
        count: int,
    ) -> Drafts:
        runner, drafter = self.runner, self.runner.drafter
        group = max(getattr(drafter, "kv_cache_gid", 0), 0)
        kept, index, tokens = _kept_rows(windows, going, rows[group])
        device = hidden.device
        next_tokens = torch.tensor(
            [windows[i].last_token for i in going], dtype=torch.int32, device=device
        )
        sampling = _sampling_of(
            runner.input_batch.sampling_metadata, [windows[i].request for i in going], device
        )
        found = drafter.propose(
            num_speculative_tokens=count,
            target_token_ids=torch.tensor(tokens, dtype=torch.int32, device=device),
            target_positions=kept.positions,
            target_hidden_states=hidden[index],
            next_token_ids=next_tokens,
            token_indices_to_sample=None,
            common_attn_metadata=common_attention_metadata(kept),
            sampling_metadata=sampling,
        )
        return Drafts(found.tolist())


def _kept_rows(
    windows: Sequence[Window], going: Sequence[int], rows: Rows
) -> tuple[Rows, torch.Tensor, list[int]]:
    """Of the rows of a slim pass those whose tokens the windows kept: [first row, kept drafts].

    Returns:
        the rows, [T'] int64 where they are among those of the pass, and their tokens.
    """
    chosen = np.array(going)
    first = rows.first[chosen]
    # The newest token of the window has no row yet: the drafter gets it as the next token.
    last = np.array([windows[i].last_position - 1 for i in going], dtype=np.int64)
    sequence, positions, query_start = ragged_ranges(first, last)
    index = rows.query_start[chosen][sequence] + (positions - first[sequence])
    tokens = []
    for i in going:
        window = windows[i]
        history = [window.newest, *window.tokens]
        start = int(rows.first[i]) - window.position
        tokens += history[start : len(history) - 1]
    on_device = torch.from_numpy(index).to(rows.slots_device.device)
    kept = Rows(
        first=first,
        last=last,
        query_start=query_start,
        slots=rows.slots[index],
        slots_device=rows.slots_device[on_device],
        positions=rows.positions[on_device],
        block_table=rows.block_table[torch.from_numpy(chosen).to(rows.block_table.device)],
    )
    return kept, on_device, tokens


def _sampling_of(metadata: Any, requests: Sequence[int], device: torch.device) -> Any:
    """vLLM's sampling metadata for some rows of the batch: what a drafter reads of it."""
    rows = torch.tensor(requests, device=device)

    def of_rows(value: Any) -> Any:
        return None if value is None else value[rows]

    return replace(
        metadata,
        temperature=of_rows(metadata.temperature),
        top_k=of_rows(metadata.top_k),
        top_p=of_rows(metadata.top_p),
        # Drafts must not be drawn from what the target draws from.
        generators={},
    )
