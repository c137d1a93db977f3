# SPDX-License-Identifier: Apache-2.0
"""What is drawn behind drafts, by vLLM's own sampler with the noise that plain decoding would draw
with: a draft stays iff it is the token that the full model draws in its place. The slim verifier
draws in the same way, so that both mostly agree (see `ops/tiers.py`).
"""

from collections.abc import Sequence
from typing import Any

import torch
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.sample.rejection_sampler import PLACEHOLDER_TOKEN_ID
from vllm.v1.sample.sampler import Sampler

from vllm_nvium.model_executor.via_sd.step import Drafts, SlimDraws, Window
from vllm_nvium.via_sd.row_metadata import RowGenerators, Span, metadata_of_spans, with_first_rows

# --- the full model -------------------------------------------------------------------------------


def sample_spans(
    sampler: Sampler,
    logits: torch.Tensor,
    batch: Any,
    requests: Any,
    spans: Sequence[Span],
    kept: Sequence[bool],
) -> SamplerOutput:
    """Samples behind drafts: each request gets the drafts that are equal to what the full model
    draws, then its draw at the first that is not, or behind the last. Generators are left where
    plain decoding would leave them after these tokens.

    Args:
        logits: [T, V], rows of all spans; may be changed.
        batch, requests: vLLM's input batch, and its states of requests by id.
        spans: one for each request of the batch, in its order.
        kept: for each draft of all spans whether the paper's rule keeps it without asking.

    Returns:
        as of vLLM's rejection sampler: tokens [B, D + 1], padded, and log-probabilities [B * (D +
        1), ...], of which only those of tokens count.
    """
    generators = RowGenerators(spans)
    metadata = metadata_of_spans(batch, requests, spans, generators, all_requests=True)
    if any(kept):
        metadata.logitsprocs.non_argmax_invariant.append(_KeptUnasked(spans, kept, logits.device))
    output = sampler(logits, metadata)
    drawn = output.sampled_token_ids.flatten().tolist()
    most = max(len(span.drafts) for span in spans)
    tokens = torch.full((len(spans), most + 1), PLACEHOLDER_TOKEN_ID, dtype=torch.int32)
    for number, (first, span) in enumerate(with_first_rows(spans)):
        accepted = 0
        while accepted < len(span.drafts) and drawn[first + accepted] == span.drafts[accepted]:
            accepted += 1
        new = drawn[first : first + accepted + 1]
        tokens[number, : len(new)] = torch.tensor(new, dtype=torch.int32)
        if accepted < len(span.drafts):
            generators.rewind(first + accepted + 1)
    return SamplerOutput(
        sampled_token_ids=tokens.to(logits.device),
        logprobs_tensors=_padded(output.logprobs_tensors, spans, most),
    )


def _padded(
    found: LogprobsTensors | None, spans: Sequence[Span], most: int
) -> LogprobsTensors | None:
    """Log-probabilities of all rows, [T, ...], as [B * (most + 1), ...]."""
    if found is None:
        return None
    index = [
        first + min(place, len(span.drafts))
        for first, span in with_first_rows(spans)
        for place in range(most + 1)
    ]
    rows = torch.tensor(index, device=found.logprobs.device)
    return LogprobsTensors(
        found.logprob_token_ids[rows], found.logprobs[rows], found.selected_token_ranks[rows]
    )


class _KeptUnasked:
    """A logits processor that puts all weight on drafts which the paper's rule keeps.

    Log-probabilities are the full model's all the same: vLLM takes them before (`raw_logprobs`, its
    default).

    Args:
        spans: of all requests; kept: for each of their drafts.
    """

    def __init__(
        self, spans: Sequence[Span], kept: Sequence[bool], device: torch.device | str
    ) -> None:
        places = [
            (first + place, token)
            for first, span in with_first_rows(spans)
            for place, token in enumerate(span.drafts)
        ]
        chosen = [place for place, keep in zip(places, kept, strict=True) if keep]
        self.rows, self.tokens = torch.tensor(chosen, device=device).T

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        # What a request forbids stays forbidden.
        allowed = logits[self.rows, self.tokens] > -torch.inf
        rows, tokens = self.rows[allowed], self.tokens[allowed]
        logits[rows] = -torch.inf
        logits[rows, tokens] = 0.0
        return logits


# --- the slim verifier ----------------------------------------------------------------------------


def draw_slim(
    sampler: Sampler,
    logits: torch.Tensor,
    batch: Any,
    requests: Any,
    windows: Sequence[Window],
    drafts: Drafts,
) -> SlimDraws:
    """What the slim verifier draws behind each row of its pass, under all that the requests ask of
    the sampler. Generators stay where they are: the full model draws with the same noise.

    Args:
        logits: [T, V], rows [last token, drafts] of each window in turn; may be changed.
        batch, requests: vLLM's input batch, and its states of requests by id.
        windows: their `noise` is extended.
    """
    spans = [
        Span(
            window.request,
            tokens,
            window.tokens,
            # Under the paper's rule it draws with noise of its own, see `tiers.paper_law`.
            None if window.is_paper else batch.generators.get(window.request),
        )
        for window, tokens in zip(windows, drafts.tokens, strict=True)
    ]
    for window, span in zip(windows, spans, strict=True):
        if span.generator is not None:
            now = span.generator.get_state()
            window.noise.setdefault(0, now)
            span.generator.set_state(window.noise[len(window.tokens)])
    generators = RowGenerators(spans)
    metadata = metadata_of_spans(batch, requests, spans, generators, all_requests=False)
    logits = sampler.apply_logits_processors(logits.to(torch.float32), metadata, False)
    shares = None
    if any(window.is_paper for window in windows):
        shares = _shares(sampler, logits.clone(), metadata, spans)
    confidences = (logits.amax(dim=1) - logits.logsumexp(dim=1)).exp().tolist()
    tokens, _ = sampler.sample(logits, metadata)
    for window, (first, span) in zip(windows, with_first_rows(spans), strict=True):
        if span.generator is not None:
            place = len(window.tokens)
            for row in range(span.num_rows):
                if first + row in generators.states:
                    window.noise[place + row] = generators.states[first + row]
            window.noise[place + span.num_rows] = span.generator.get_state()
            span.generator.set_state(window.noise[0])
    return SlimDraws(tokens.long().cpu(), confidences, shares)


def _shares(
    sampler: Sampler, logits: torch.Tensor, metadata: SamplingMetadata, spans: Sequence[Span]
) -> torch.Tensor:
    """[T] float32: `q'(v) / max q'` of the draft behind each row, `q'` being the law that is drawn
    from; at temperature 0 the law at temperature 1."""
    if metadata.temperature is not None:
        logits = sampler.apply_temperature(logits, metadata.temperature, metadata.all_random)
    for processor in metadata.logitsprocs.argmax_invariant:
        logits = processor.apply(logits)
    logits = apply_top_k_top_p(logits, metadata.top_k, metadata.top_p)
    behind = [token for span in spans for token in (*span.drafts, -1)]
    following = torch.tensor(behind, device=logits.device)
    chosen = logits.gather(1, following.clamp(min=0)[:, None]).squeeze(1)
    shares = (chosen - logits.amax(dim=1)).exp()
    return torch.where(following < 0, 0.0, shares).cpu()
